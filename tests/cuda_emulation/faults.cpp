// Small kernels with a fault each, and the same without: the emulation must tell the one from the other,
// under every schedule. Prints what it got wrong.
#include <cstdio>
#include <vector>

#include "ptx_sm90_emulated.h"

namespace {

namespace ptx = ak::ptx;

int failures = 0;

/// Expects the launch to fail with a message that holds `message`, or "" to pass.
void expect(const char *what, const char *message, const emulation::Launch &shape, const std::function<void()> &body) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    emulation::options.seed = seed;
    shape.run(body);
    const std::string error = std::move(emulation::last_error);
    emulation::last_error.clear();
    const bool as_expected = *message ? error.find(message) != std::string::npos : error.empty();
    if (as_expected) continue;
    ++failures;
    printf("%s, seed %d: \"%s\", expected \"%s\"\n", what, int(seed), error.c_str(), message);
  }
}

float *floats() { return reinterpret_cast<float *>(emulation::block->dynamic_shared()); }

void neighbours(bool with_barrier) {
  ptx::store_shared(floats() + threadIdx.x, float(threadIdx.x));
  if (with_barrier) __syncthreads();
  ptx::load_shared(floats() + (threadIdx.x + 32) % 64);
}

void lanes(bool with_barrier) {
  ptx::store_shared(floats() + threadIdx.x, 1.0f);
  if (with_barrier) __syncwarp();
  ptx::load_shared(floats() + (threadIdx.x ^ 1));
}

void overwriting_what_is_read(bool with_barrier) {
  if (threadIdx.x < 32) ptx::store_shared(floats() + threadIdx.x, 1.0f);
  __syncthreads();
  if (threadIdx.x < 32) ptx::load_shared(floats() + threadIdx.x);
  if (with_barrier) __syncthreads();
  if (threadIdx.x >= 32) ptx::store_shared(floats() + threadIdx.x - 32, 2.0f);
}

void copying(const float *source, int waits, bool with_barrier) {
  ptx::copy_async(floats() + 4 * threadIdx.x, source + 4 * threadIdx.x, true);
  ptx::commit_copies();
  if (waits == 0) ptx::wait_copies<0>();
  if (waits == 1) ptx::wait_copies<1>();
  if (with_barrier) __syncthreads();
  ptx::load_shared(floats() + 4 * ((threadIdx.x + 32) % 64));
}

void bulk_copying(const float *source, bool with_wait, int expected) {
  auto *full = reinterpret_cast<uint64_t *>(floats() + 64);
  if (threadIdx.x == 0) ptx::barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::barrier_expect(full, expected);
    ptx::bulk_copy(floats(), source, 256, full);
  }
  if (with_wait) ptx::barrier_wait(full, 0);
  ptx::load_shared(floats() + threadIdx.x);
}

void shared_ring(const float *source, bool with_arrival) {  // one buffer, filled twice
  auto *full = reinterpret_cast<uint64_t *>(floats() + 64), *empty = full + 1;
  if (threadIdx.x == 0) ptx::barrier_init(full, 1), ptx::barrier_init(empty, 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x) return;
    for (int t = 0; t < 2; ++t) {
      if (with_arrival) ptx::barrier_wait(empty, (t & 1) ^ 1);
      ptx::barrier_expect(full, 256);
      ptx::bulk_copy(floats(), source, 256, full);
      if (!with_arrival) ptx::barrier_wait(full, t & 1);
    }
    return;
  }
  for (int t = 0; t < 2; ++t) {
    ptx::barrier_wait(full, t & 1);
    ptx::load_shared(floats() + threadIdx.x);
    __syncwarp();
    if (threadIdx.x == 32 && with_arrival) ptx::barrier_arrive(empty);
  }
}

}  // namespace

int main() {
  alignas(16) static const float source[256] = {};
  const size_t bytes = 2048;
  expect("a barrier between warps", "", {1, 64, bytes}, [] { neighbours(true); });
  expect("no barrier between warps", "shared[", {1, 64, bytes}, [] { neighbours(false); });
  expect("a barrier between lanes", "", {1, 32, bytes}, [] { lanes(true); });
  expect("no barrier between lanes", "load: thread", {1, 32, bytes}, [] { lanes(false); });
  expect("a barrier before overwriting", "", {1, 64, bytes}, [] { overwriting_what_is_read(true); });
  expect("no barrier before overwriting", "with no barrier between", {1, 64, bytes},
         [] { overwriting_what_is_read(false); });
  expect("copies waited for", "", {1, 64, bytes}, [] { copying(source, 0, true); });
  expect("copies not waited for", "in flight", {1, 64, bytes}, [] { copying(source, -1, true); });
  expect("one group of copies left open", "in flight", {1, 64, bytes}, [] { copying(source, 1, true); });
  expect("copies of others not waited for", "load: thread", {1, 64, bytes}, [] { copying(source, 0, false); });
  expect("a bulk copy waited for", "", {1, 64, bytes}, [] { bulk_copying(source, true, 256); });
  expect("a bulk copy not waited for", "load: thread", {1, 64, bytes}, [] { bulk_copying(source, false, 256); });
  expect("more bytes expected than come", "deadlock", {1, 64, bytes}, [] { bulk_copying(source, true, 512); });
  expect("a ring that is released", "", {1, 64, bytes}, [] { shared_ring(source, true); });
  expect("a ring that is not", "shared[", {1, 64, bytes}, [] { shared_ring(source, false); });
  expect("beyond shared memory", "outside of the block's shared memory", {1, 32, 64},
         [] { ptx::store_shared(floats() + 16, 0.0f); });
  expect("what nobody wrote", "uninitialised", {1, 32, bytes}, [] { ptx::load_shared(floats()); });
  expect("diverging lanes", "diverges", {1, 32, bytes}, [] {
    if (threadIdx.x % 2) {
      __shfl_xor_sync(~0u, 1.0f, 1);
    } else {
      __syncwarp();
    }
  });
  expect("a barrier that a warp skips", "deadlock", {1, 64, bytes}, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  return failures != 0;
}

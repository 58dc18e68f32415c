// Threads: OpenMP, because torch's own runtime is then shared (its workers spin after every torch op, so
// a second pool would fight them for the cores). Compiled without OpenMP, std::thread takes its place:
// that is for ThreadSanitizer, which does not know OpenMP's barriers.
//
// Included by files of several instruction sets: everything has internal linkage, and nothing of the
// standard library is used that is not always inlined, so that the linker can never replace a baseline
// function by its AVX-512 twin.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace {

// body(thread) in up to `threads` threads at once; how many there really are is not known. Returns when
// all have returned.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back([&body, thread] { body(thread); });
  body(0);
  for (std::thread& other : others) other.join();
#endif
}

// Hands out 0 … count − 1, each to one thread, in ascending order.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t count) : count_(count) {}
  // The next piece of work, or −1.
  int64_t take() {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < count_ ? item : -1;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// body(item) for item in 0 … count − 1, spread over the threads.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  WorkQueue queue(count);
  parallel(count < threads ? static_cast<int>(count) : threads, [&](int) {
    for (int64_t item = queue.take(); item >= 0; item = queue.take()) body(item);
  });
}

// Counts the tasks that have finished with a block of rows; the next task on it waits for its turn.
class Turn {
 public:
  void wait_for(int64_t turn) const {
    for (int spins = 0; finished_.load(std::memory_order_acquire) != turn; ++spins) {
      if (spins > 1000) sched_yield();  // more threads than cores: let the one before us run
    }
  }
  void pass_on() { finished_.store(finished_.load(std::memory_order_relaxed) + 1, std::memory_order_release); }

 private:
  std::atomic<int64_t> finished_{0};
};

}  // namespace

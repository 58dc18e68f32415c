// The emulated instructions against published layouts and direct sums. Prints what differs.
#include <cstdio>
#include <vector>

#include "ptx_sm90_emulated.h"

using Number = __nv_bfloat16;

namespace {

int failures = 0;

float left_value(int i) { return float((i * 37 + 11) % 29 - 14); }
float right_value(int i) { return float((i * 53 + 7) % 23 - 11); }

uint32_t pack(float x, float y) {
  return uint32_t(__float2bfloat16_rn(x).bits) | uint32_t(__float2bfloat16_rn(y).bits) << 16;
}

void launch(const char *what, const emulation::Launch &shape, const std::function<void()> &body) {
  shape.run(body);
  if (emulation::last_error.empty()) return;
  ++failures;
  printf("%s: %s\n", what, emulation::last_error.c_str());
  emulation::last_error.clear();
}

/// mma.m16n8k16 as CuTe publishes it (MMA_Traits<SM80_16x8x16_...>): an index m + M k from (lane % 4,
/// lane / 4) and the bits of the value's number.
void multiply_add_of_a_warp() {
  const int lane = int(threadIdx.x), t = lane % 4, g = lane / 4;
  auto left = [&](int v) { return left_value(t * 32 + g + (v & 1) * 16 + (v >> 1 & 1) * 8 + (v >> 2) * 128); };
  auto right = [&](int v) { return right_value(t * 16 + g + (v & 1) * 8 + (v >> 1) * 64); };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) a[r] = pack(left(2 * r), left(2 * r + 1));
  for (int r = 0; r < 2; ++r) b[r] = pack(right(2 * r), right(2 * r + 1));
  float d[4] = {};
  ak::ptx::multiply_add<Number>(d, a, b[0], b[1]);
  for (int v = 0; v < 4; ++v) {
    const int i = t * 32 + g + (v & 1) * 16 + (v >> 1) * 8, m = i % 16, n = i / 16;
    float expected = 0;
    for (int k = 0; k < 16; ++k) expected += left_value(m + 16 * k) * right_value(n + 8 * k);
    if (d[v] != expected)
      emulation::fail("lane %d value %d: %g, expected %g", lane, v, double(d[v]), double(expected));
  }
}

constexpr int kRows = 64, kColumns = 128, kBox = 64;

struct Matrices {
  std::vector<Number> left = std::vector<Number>(kRows * kRows);      // (rows, k), also (rows, columns / 2)
  std::vector<Number> right = std::vector<Number>(kColumns * kRows);  // (columns, k)
  CUtensorMap left_map, right_map;

  Matrices() {
    for (size_t i = 0; i < left.size(); ++i) left[i] = __float2bfloat16_rn(left_value(int(i)));
    for (size_t i = 0; i < right.size(); ++i) right[i] = __float2bfloat16_rn(right_value(int(i)));
    left_map = describe(left, kRows);
    right_map = describe(right, kColumns);
  }

  static CUtensorMap describe(std::vector<Number> &matrix, int rows) {
    const cuuint64_t extent[2] = {kBox, cuuint64_t(rows)}, stride[1] = {kBox * 2};
    const cuuint32_t box[2] = {kBox, cuuint32_t(rows)}, step[2] = {1, 1};
    CUtensorMap map;
    cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data(), extent, stride, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return map;
  }
};

/// wgmma, both operands along rows: left (64 x 64) right^T (64 x 128).
void product_along_rows(const Matrices &m) {
  auto *left = reinterpret_cast<Number *>(emulation::block->dynamic_shared()), *right = left + kRows * kBox;
  auto *full = reinterpret_cast<uint64_t *>(right + kColumns * kBox);
  if (threadIdx.x == 0) {
    ak::ptx::barrier_init(full, 1);
    ak::ptx::barrier_expect(full, (kRows + kColumns) * kBox * 2);
    ak::ptx::tensor_copy(left, &m.left_map, full, 0, 0);
    ak::ptx::tensor_copy(right, &m.right_map, full, 0, 0);
  }
  __syncthreads();
  ak::ptx::barrier_wait(full, 0);
  float d[kColumns / 2];
  ak::ptx::group_fence();
  auto descriptor = [](const Number *p) {
    return uint64_t(ak::ptx::shared_address(p) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  };
  for (int step = 0; step < kBox / 16; ++step)
    ak::ptx::group_multiply_add<Number>(d, descriptor(left + step * 16), descriptor(right + step * 16), step > 0);
  ak::ptx::group_commit();
  ak::ptx::group_wait<0>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    float expected = 0;
    for (int k = 0; k < kBox; ++k) expected += left_value(row * kBox + k) * right_value(column * kBox + k);
    if (d[i] != expected) emulation::fail("(%d, %d): %g, expected %g", row, column, double(d[i]), double(expected));
  }
}

/// wgmma, left (64 x 128) in registers, right (128 x 64) across rows: the second product of a backward pass.
void product_across_rows(const Matrices &m) {
  auto *right = reinterpret_cast<Number *>(emulation::block->dynamic_shared());
  auto *full = reinterpret_cast<uint64_t *>(right + kColumns * kBox);
  if (threadIdx.x == 0) {
    ak::ptx::barrier_init(full, 1);
    ak::ptx::barrier_expect(full, kColumns * kBox * 2);
    ak::ptx::tensor_copy(right, &m.right_map, full, 0, 0);
  }
  __syncthreads();
  ak::ptx::barrier_wait(full, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[kBox / 2];
  ak::ptx::group_fence();
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + 8 * (i % 2), k = step * 16 + 2 * (lane % 4) + 8 * (i / 2);
      a[i] = pack(left_value(row * kColumns + k), left_value(row * kColumns + k + 1));
    }
    const uint64_t start = ak::ptx::shared_address(right + step * 16 * kBox) >> 4;
    ak::ptx::group_multiply_add_across<Number>(
        d, a, start | uint64_t(kColumns * kBox * 2 >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62, step > 0);
  }
  ak::ptx::group_commit();
  ak::ptx::group_wait<0>();
  for (int i = 0; i < kBox / 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    float expected = 0;
    for (int k = 0; k < kColumns; ++k) expected += left_value(row * kColumns + k) * right_value(k * kBox + column);
    if (d[i] != expected) emulation::fail("(%d, %d): %g, expected %g", row, column, double(d[i]), double(expected));
  }
}

}  // namespace

int main() {
  const Matrices matrices;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    emulation::options.seed = seed;
    launch("mma.m16n8k16", {1, 32}, multiply_add_of_a_warp);
    const size_t bytes = (kRows + kColumns) * kBox * 2 + 8;
    launch("wgmma along rows", {1, 128, bytes}, [&] { product_along_rows(matrices); });
    launch("wgmma across rows", {1, 128, bytes}, [&] { product_across_rows(matrices); });
  }
  return failures != 0;
}

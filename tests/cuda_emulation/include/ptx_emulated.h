// What the instructions of ptx.cuh do, as the PTX ISA (section 9.7) states it.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace ak::ptx {

using emulation::block;
using emulation::fail;
using emulation::fiber;
using emulation::statistics;

inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float number(__half x) { return __half2float(x); }
template <typename T>
float half_of(uint32_t pair, int which) {
  T x;
  x.bits = uint16_t(pair >> (16 * which));
  return number(x);
}

inline uint32_t shared_address(const void *p) {
  block->check_inside(p, 1, "shared address");
  return uint32_t(static_cast<const char *>(p) - emulation::arena());
}

template <typename T>
T load_shared(const T *p) {
  block->on_read(p, sizeof(T), "load");
  return *p;
}
template <typename T>
void store_shared(T *p, T value) {
  block->on_write(p, sizeof(T), "store");
  *p = value;
}

inline float exp2(float x) { return std::exp2(x); }

inline void copy_async(void *shared, const void *global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("cp.async: shared address not a multiple of %d", 16);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    fail("cp.async: global address not a multiple of %d", 16);
  block->copy({static_cast<char *>(shared), static_cast<const char *>(global), 16, valid ? 16 : 0});
}
inline void commit_copies() { block->commit_copies(); }
template <int kMost>
void wait_copies() {
  block->wait_copies(kMost);
}

template <bool kTransposed>
void load_matrices_as(uint32_t (&r)[4], uint32_t address) {
  const char *row = emulation::arena() + address;
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: row address not a multiple of %d", 16);
  block->on_read(row, 16, "ldmatrix");
  struct Slot { const uint16_t *row; uint32_t *r; } slot{reinterpret_cast<const uint16_t *>(row), r};
  block->meet(~0u, kTransposed ? "ldmatrix.trans" : "ldmatrix", &slot, [](void **slots) {
    auto at = [&](int i) { return static_cast<Slot *>(slots[i]); };
    ++statistics.ldmatrix;
    for (int m = 0; m < 4; ++m) {
      unsigned banks[8] = {};  // groups of four banks: 16 bytes each
      for (int i = 0; i < 8; ++i) {
        const unsigned group = unsigned(reinterpret_cast<uintptr_t>(at(8 * m + i)->row) / 16 % 8);
        statistics.bank_conflicts += banks[group]++ > 0;
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t low = kTransposed ? at(8 * m + j)->row[i] : at(8 * m + i)->row[j];
        const uint16_t high = kTransposed ? at(8 * m + j + 1)->row[i] : at(8 * m + i)->row[j + 1];
        at(lane)->r[m] = uint32_t(low) | uint32_t(high) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&r)[4], uint32_t row) { load_matrices_as<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) { load_matrices_as<true>(r, row); }

/// mma.m16n8k16: lane = 4 g + t. a[i]: row g (+8 if i odd), columns 2t, 2t+1 (+8 if i >= 2);
/// b[i]: rows 2t, 2t+1 (+8 if i == 1), column g; d[i]: row g (+8 if i >= 2), column 2t + i % 2.
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot { float *d; const uint32_t *a; uint32_t b[2]; } slot{d, a, {b0, b1}};
  block->meet(~0u, "mma", &slot, [](void **slots) {
    auto at = [&](int i) { return static_cast<Slot *>(slots[i]); };
    ++statistics.mma;
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          A[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = half_of<T>(at(lane)->a[i], half);
        for (int i = 0; i < 2; ++i) B[2 * t + half + 8 * i][g] = half_of<T>(at(lane)->b[i], half);
      }
    }
    float D[16][8] = {};
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        at(lane)->d[i] += D[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  });
}

}  // namespace ak::ptx

// Instructions of sm_90a: barriers in memory, bulk copies, products of warpgroups (128 threads).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ptx.cuh"

#ifdef AK_EMULATED
#include "ptx_sm90_emulated.h"
#else

// The operands of a product whose result is 32 or 64 registers: their names in the text, their constraints.
#define AK_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define AK_NAMES_32 AK_TEN() AK_TEN(1) AK_TEN(2) "%30, %31"
#define AK_NAMES_64 AK_TEN() AK_TEN(1) AK_TEN(2) AK_TEN(3) AK_TEN(4) AK_TEN(5) "%60, %61, %62, %63"
#define AK_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define AK_SIXTEEN(i) AK_FOUR(i), AK_FOUR(i + 4), AK_FOUR(i + 8), AK_FOUR(i + 12)
#define AK_REGISTERS_32 AK_SIXTEEN(0), AK_SIXTEEN(16)
#define AK_REGISTERS_64 AK_REGISTERS_32, AK_SIXTEEN(32), AK_SIXTEEN(48)
#define AK_PRODUCT(columns, type) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type

// `a`, `b`, `add`: the operands' numbers, those after the registers of the result.
#define AK_MULTIPLY_ADD(columns, registers, type, a_number, b_number, add_number)                     \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #add_number ", 0;\n" AK_PRODUCT(columns, type) " {"  \
               AK_NAMES_##registers "}, %" #a_number ", %" #b_number ", p, 1, 1, 0, 0;}\n"            \
               : AK_REGISTERS_##registers                                                             \
               : "l"(a), "l"(b), "r"(int(add)))
#define AK_MULTIPLY_ADD_ACROSS(columns, registers, type, a0, a1, a2, a3, b_number, add_number)        \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #add_number ", 0;\n" AK_PRODUCT(columns, type) " {"  \
               AK_NAMES_##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_number        \
               ", p, 1, 1, 1;}\n"                                                                     \
               : AK_REGISTERS_##registers                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

namespace ak::ptx {

__device__ inline void barrier_init(uint64_t *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/// Makes initialised barriers known to the asynchronous proxy.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrives, and makes the phase last until `bytes` more have been copied.
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
/// Until the phase of this parity has ended.
__device__ inline void barrier_wait(uint64_t *barrier, int parity) {
  asm volatile(
      "{.reg .pred p;\nAK_WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra AK_DONE;\nbra AK_WAIT;\nAK_DONE:}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// A box of the map's matrix to shared memory; zeros where the matrix has ended.
__device__ inline void tensor_copy(void *shared, const CUtensorMap *map, uint64_t *barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
/// Multiples of 16 bytes at multiples of 16.
__device__ inline void bulk_copy(void *shared, const void *global, int bytes, uint64_t *barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// A warpgroup takes registers that another has given away.
template <int kRegisters>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Waits for `threads` threads, all of them at barrier `id`.
__device__ inline void barrier_of(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kMost>
__device__ inline void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kMost) : "memory");
}

/// What is computed from d stays after this point: the compiler knows of no tie between d and a wait.
template <int kRegisters>
__device__ inline void keep_after(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// d (64 x N) = a (64 x 16, shared memory) b (16 x N, shared memory) [+ d], both along rows (K-major).
/// N is 64 or 128: twice the registers of d.
template <typename T, int kRegisters>
__device__ inline void group_multiply_add(float (&d)[kRegisters], uint64_t a, uint64_t b, bool add) {
  static_assert(kRegisters == 32 || kRegisters == 64, "64 or 128 columns");
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kRegisters == 32)
      AK_MULTIPLY_ADD(64, 32, f16, 32, 33, 34);
    else
      AK_MULTIPLY_ADD(128, 64, f16, 64, 65, 66);
  } else {
    if constexpr (kRegisters == 32)
      AK_MULTIPLY_ADD(64, 32, bf16, 32, 33, 34);
    else
      AK_MULTIPLY_ADD(128, 64, bf16, 64, 65, 66);
  }
}

/// The same with `a` in registers (a warp's 16 rows as mma.m16n8k16's) and b across rows (MN-major).
template <typename T, int kRegisters>
__device__ inline void group_multiply_add_across(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b,
                                                 bool add) {
  static_assert(kRegisters == 32 || kRegisters == 64, "64 or 128 columns");
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kRegisters == 32)
      AK_MULTIPLY_ADD_ACROSS(64, 32, f16, 32, 33, 34, 35, 36, 37);
    else
      AK_MULTIPLY_ADD_ACROSS(128, 64, f16, 64, 65, 66, 67, 68, 69);
  } else {
    if constexpr (kRegisters == 32)
      AK_MULTIPLY_ADD_ACROSS(64, 32, bf16, 32, 33, 34, 35, 36, 37);
    else
      AK_MULTIPLY_ADD_ACROSS(128, 64, bf16, 64, 65, 66, 67, 68, 69);
  }
}

}  // namespace ak::ptx
#endif

namespace ak::ptx {

/// Waits until at most kMost groups of products are under way; d is not among theirs.
template <int kMost, int kRegisters>
__device__ inline void group_wait_for(float (&d)[kRegisters]) {
  group_wait<kMost>();
  keep_after(d);
}

/// Of rows of 128 bytes that a tensor copy permuted (128-byte swizzle). `leading`, `stride`: bytes.
__device__ inline uint64_t descriptor(const void *p, int leading, int stride) {
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

/// The same matrix, `bytes` further on.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes >> 4); }

}  // namespace ak::ptx

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in kernels_avx512.cpp
#endif

#include "bfloat16_table.h"
#include "vector_avx512bf16.h"

namespace action_kernels {

const KernelTable avx512bf16_kernels = Bfloat16Kernels<Avx512Bf16>::table("avx512bf16");

}  // namespace action_kernels

#endif

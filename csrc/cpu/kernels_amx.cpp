#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in kernels_avx512.cpp
#endif

#include "bfloat16_table.h"
#include "vector_amx.h"

namespace action_kernels {

const KernelTable amx_kernels = Bfloat16Kernels<Amx>::table("amx");

}  // namespace action_kernels

#endif

#if defined(__x86_64__)

// GCC 12 takes the deliberately undefined operands of its own intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernel_table.h"
#include "vector_avx512.h"

namespace action_kernels {

const KernelTable avx512_kernels = kernel_table<Avx512>("avx512");

}  // namespace action_kernels

#endif

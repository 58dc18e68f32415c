#if defined(__x86_64__)

// GCC 12 takes the deliberately undefined operands of its own intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "pairwise_lse.h"
#include "prepare_rows.h"
#include "sample_pixels.h"
#include "vector_avx512.h"

namespace action_kernels {

const KernelTable avx512_kernels = {
    "avx512",           lse_workspace<Avx512>, lse_kept<Avx512>, lse_forward<Avx512>,
    lse_backward<Avx512>, prepare_forward<Avx512>, prepare_backward<Avx512>,
    sample_workspace,     sample_pixels<Avx512>,
};

}  // namespace action_kernels

#endif

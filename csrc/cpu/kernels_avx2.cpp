#if defined(__x86_64__)

#include "pairwise_lse.h"
#include "prepare_rows.h"
#include "sample_pixels.h"
#include "vector_avx2.h"

namespace action_kernels {

const KernelTable avx2_kernels = {
    "avx2",           lse_workspace<Avx2>, lse_kept<Avx2>, lse_forward<Avx2>,
    lse_backward<Avx2>, prepare_forward<Avx2>, prepare_backward<Avx2>,
    sample_workspace,     sample_pixels<Avx2>,
};

}  // namespace action_kernels

#endif

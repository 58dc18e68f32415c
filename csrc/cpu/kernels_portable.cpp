#include "pairwise_lse.h"
#include "prepare_rows.h"
#include "sample_pixels.h"
#include "vector_portable.h"

namespace action_kernels {

const KernelTable portable_kernels = {
    "portable",           lse_workspace<Portable>, lse_kept<Portable>, lse_forward<Portable>,
    lse_backward<Portable>, prepare_forward<Portable>, prepare_backward<Portable>,
    sample_workspace,     sample_pixels<Portable>,
};

}  // namespace action_kernels

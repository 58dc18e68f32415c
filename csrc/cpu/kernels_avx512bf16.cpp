#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in kernels_avx512.cpp
#endif

#include "pairwise_lse.h"
#include "vector_avx512bf16.h"

namespace action_kernels {
namespace {

bool in_pairs(const LseCall& call) { return call.anchors.dtype == AK_BFLOAT16 || call.allow_bfloat16; }

int64_t workspace(const LseCall& call) {
  return in_pairs(call) ? lse_workspace<Avx512Bf16>(call) : avx512_kernels.lse_workspace(call);
}

int64_t kept(const LseCall& call) { return in_pairs(call) ? 0 : avx512_kernels.lse_kept(call); }

void forward(const LseCall& call) {
  in_pairs(call) ? lse_forward<Avx512Bf16>(call) : avx512_kernels.lse_forward(call);
}

void backward(const LseCall& call) {
  in_pairs(call) ? lse_backward<Avx512Bf16>(call) : avx512_kernels.lse_backward(call);
}

// Row preparation is bound by memory, and sampling has no products: AVX-512's serve.
void prepare_forward(const PrepareCall& call) { avx512_kernels.prepare_forward(call); }
void prepare_backward(const PrepareCall& call) { avx512_kernels.prepare_backward(call); }
int64_t sample_workspace(const SampleCall& call) { return avx512_kernels.sample_workspace(call); }
void sample_pixels(const SampleCall& call) { avx512_kernels.sample_pixels(call); }

}  // namespace

const KernelTable avx512bf16_kernels = {
    "avx512bf16",    workspace,        kept,             forward,       backward,
    prepare_forward, prepare_backward, sample_workspace, sample_pixels,
};

}  // namespace action_kernels

#endif

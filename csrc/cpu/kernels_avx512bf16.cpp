#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in kernels_avx512.cpp
#endif

#include "pairwise_lse.h"
#include "pairwise_softplus.h"
#include "vector_avx512bf16.h"

namespace action_kernels {
namespace {

bool in_pairs(const PairCall& call) { return call.anchors.dtype == AK_BFLOAT16 || call.allow_bfloat16; }

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

int64_t softplus_workspace(const SoftplusCall& call) {
  return in_pairs(call) ? ::softplus_workspace<Avx512Bf16>(call) : avx512_kernels.softplus_workspace(call);
}

void softplus_forward(const SoftplusCall& call) {
  in_pairs(call) ? ::softplus_forward<Avx512Bf16>(call) : avx512_kernels.softplus_forward(call);
}

void softplus_backward(const SoftplusCall& call) {
  in_pairs(call) ? ::softplus_backward<Avx512Bf16>(call) : avx512_kernels.softplus_backward(call);
}

}  // namespace

// Row preparation is bound by memory, and sampling has no products: AVX-512's serve. (Its table is a constant,
// there before this one is made.)
const KernelTable avx512bf16_kernels = [] {
  KernelTable table = avx512_kernels;
  table.name = "avx512bf16";
  table.lse_workspace = workspace;
  table.lse_kept = kept;
  table.lse_forward = forward;
  table.lse_backward = backward;
  table.softplus_workspace = softplus_workspace;
  table.softplus_forward = softplus_forward;
  table.softplus_backward = softplus_backward;
  return table;
}();

}  // namespace action_kernels

#endif

// The table of an instruction set that multiplies pairs of bfloat16: ops on pairs of rows for bfloat16 rows,
// or float32 rows where that is allowed; everything else is AVX-512's. (Row preparation is bound by memory,
// and sampling has no products.)
#pragma once

#include "pairwise_lse.h"
#include "pairwise_softplus.h"

namespace {

using action_kernels::avx512_kernels;
using action_kernels::KernelTable;
using action_kernels::PairCall;
using action_kernels::SoftplusCall;

inline bool in_pairs(const PairCall& call) { return call.anchors.dtype == AK_BFLOAT16 || call.allow_bfloat16; }

// Plain function pointers, so that the choice is made at each call.
template <class I>
struct Bfloat16Kernels {
  static int64_t workspace(const LseCall& call) {
    return in_pairs(call) ? lse_workspace<I>(call) : avx512_kernels.lse_workspace(call);
  }
  static int64_t kept(const LseCall& call) { return in_pairs(call) ? 0 : avx512_kernels.lse_kept(call); }
  static void forward(const LseCall& call) {
    in_pairs(call) ? lse_forward<I>(call) : avx512_kernels.lse_forward(call);
  }
  static void backward(const LseCall& call) {
    in_pairs(call) ? lse_backward<I>(call) : avx512_kernels.lse_backward(call);
  }
  static int64_t workspace_of_softplus(const SoftplusCall& call) {
    return in_pairs(call) ? softplus_workspace<I>(call) : avx512_kernels.softplus_workspace(call);
  }
  static void forward_of_softplus(const SoftplusCall& call) {
    in_pairs(call) ? softplus_forward<I>(call) : avx512_kernels.softplus_forward(call);
  }
  static void backward_of_softplus(const SoftplusCall& call) {
    in_pairs(call) ? softplus_backward<I>(call) : avx512_kernels.softplus_backward(call);
  }

  // AVX-512's table is a constant, there before this one is made.
  static KernelTable table(const char* name) {
    KernelTable table = avx512_kernels;
    table.name = name;
    table.lse_workspace = workspace;
    table.lse_kept = kept;
    table.lse_forward = forward;
    table.lse_backward = backward;
    table.softplus_workspace = workspace_of_softplus;
    table.softplus_forward = forward_of_softplus;
    table.softplus_backward = backward_of_softplus;
    return table;
  }
};

}  // namespace

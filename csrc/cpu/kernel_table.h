// Every kernel of one instruction set, for its translation unit: a new kernel is entered here once.
#pragma once

#include "center_lse.h"
#include "class_sums.h"
#include "indexed_lse.h"
#include "pairwise_lse.h"
#include "pairwise_softplus.h"
#include "prepare_rows.h"
#include "sample_pixels.h"
#include "sampled_features.h"

namespace {

template <class Vector>
constexpr action_kernels::KernelTable kernel_table(const char* name) {
  return {
      name,
      lse_workspace<Vector>,
      lse_kept<Vector>,
      lse_forward<Vector>,
      lse_backward<Vector>,
      softplus_workspace<Vector>,
      softplus_forward<Vector>,
      softplus_backward<Vector>,
      center_workspace<Vector>,
      center_forward<Vector>,
      center_backward<Vector>,
      prepare_forward<Vector>,
      prepare_backward<Vector>,
      sample_workspace,
      sample_pixels<Vector>,
      features_forward<Vector>,
      features_workspace,
      features_backward<Vector>,
      class_sums_workspace,
      class_sums<Vector>,
      indexed_workspace<Vector>,
      indexed_lse<Vector>,
  };
}

}  // namespace

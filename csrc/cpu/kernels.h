// What a translation unit of one instruction set offers to the C ABI in api.cpp.
#pragma once

#include "../include/action_kernels.h"

namespace action_kernels {

// What calls on pairs of rows have in common, checked. Symmetric: keys is unused.
struct PairCall {
  ak_rows anchors;
  ak_rows keys;
  bool symmetric;
  int relation;  // ak_relation
  int64_t dim;
  double scale;
  bool allow_bfloat16;
  int pass;  // ak_pass
  int threads;
  int threads_worth;  // how many the shape keeps busy, whatever there are
  void* grad_anchors;
  void* grad_keys;
  void* workspace;
};

struct LseCall : PairCall {
  float* lse;              // forward
  const float* grad_lse;   // backward
  const float* saved_lse;  // backward
  void* kept;  // what the forward pass leaves to the backward pass, or NULL
  int64_t kept_bytes;
};

struct SoftplusCall : PairCall {
  const float* offsets;
  float* values;             // forward
  const float* grad_values;  // backward
  float* grad_offsets;       // backward, or NULL
};

struct CenterCall {
  ak_rows rows;  // backward: those of the gradient
  int64_t dim;
  const float* centers;  // (count, dim)
  int64_t count;
  double scale;
  int threads;
  float* lse;                        // forward
  float* probabilities;              // forward
  const float* grad_lse;             // backward
  const float* saved_probabilities;  // backward
  void* grad_rows;                   // backward, contiguous
  void* workspace;
};

struct PrepareCall {
  ak_map map;
  const uint8_t* mask;
  bool normalize;
  int rows_dtype;
  int threads;
  void* rows;              // forward
  float* factors;          // forward
  const void* grad_rows;   // backward
  const float* saved_factors;
  void* grad_map;
};

struct SampleCall {
  ak_sampling sampling;
  int threads;
  int64_t* index;
  int64_t* counts;
  void* workspace;
};

struct FeaturesCall {
  ak_neighbourhoods what;
  int64_t strides[5];    // forward: of features
  const void* features;  // forward
  void* out;             // forward
  const void* grad;      // backward
  void* gradient;        // backward
  bool channels_last;    // of the gradient
  int threads;
  void* workspace;
};

struct ClassSumsCall {
  ak_class_maps what;
  int64_t strides[5];
  const void* features;
  float* sums;
  int threads;
  void* workspace;
};

struct IndexedCall {
  ak_rows queries;
  ak_rows bank;
  int64_t dim;
  const int64_t* index;
  int64_t runs;
  int64_t columns;
  double scale;
  float* lse;
  float* mean;  // NULL if not wanted
  int threads;
  void* workspace;
};

struct KernelTable {
  const char* name;
  int64_t (*lse_workspace)(const LseCall&);
  int64_t (*lse_kept)(const LseCall&);
  void (*lse_forward)(const LseCall&);
  void (*lse_backward)(const LseCall&);
  int64_t (*softplus_workspace)(const SoftplusCall&);
  void (*softplus_forward)(const SoftplusCall&);
  void (*softplus_backward)(const SoftplusCall&);
  int64_t (*center_workspace)(const CenterCall&);
  void (*center_forward)(const CenterCall&);
  void (*center_backward)(const CenterCall&);
  void (*prepare_forward)(const PrepareCall&);
  void (*prepare_backward)(const PrepareCall&);
  int64_t (*sample_workspace)(const SampleCall&);
  void (*sample_pixels)(const SampleCall&);
  void (*features_forward)(const FeaturesCall&);
  int64_t (*features_workspace)(const FeaturesCall&);
  void (*features_backward)(const FeaturesCall&);
  int64_t (*class_sums_workspace)(const ClassSumsCall&);
  void (*class_sums)(const ClassSumsCall&);
  int64_t (*indexed_workspace)(const IndexedCall&);
  void (*indexed_lse)(const IndexedCall&);
};

extern const KernelTable portable_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const KernelTable avx512bf16_kernels;
extern const KernelTable amx_kernels;
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
#endif
#if defined(AK_TEST_EMULATED_AVX512)
// The blocking of avx512 in AVX2 instructions; the others multiply as bfloat16 whatever they are given, the last by tiles.
extern const KernelTable emulated_avx512_kernels;
extern const KernelTable emulated_avx512bf16_kernels;
extern const KernelTable emulated_amx_kernels;
#endif

}  // namespace action_kernels

/* The C ABI of the action_kernels libraries.
 *
 * Plain C, no torch: the Python side loads a library with ctypes, compares `ak_abi_version` and passes
 * pointers of tensors that torch allocated. Matrices are row-major; a row's elements are contiguous.
 * No function allocates memory that outlives the call, keeps a pointer, or throws.
 */
#ifndef ACTION_KERNELS_H
#define ACTION_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define AK_API __declspec(dllexport)
#else
#define AK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature, struct or the meaning of an argument changes. */
#define AK_ABI_VERSION 4

AK_API int ak_abi_version(void);

enum ak_dtype { AK_FLOAT32 = 0, AK_BFLOAT16 = 1, AK_FLOAT16 = 2 };

enum ak_label_dtype { AK_INT64 = 0, AK_INT32 = 1, AK_INT16 = 2, AK_INT8 = 3, AK_UINT8 = 4 };

enum ak_status {
  AK_OK = 0,
  AK_BAD_SHAPE = 1,       /* a negative count, dim < 1, or a row stride < dim */
  AK_BAD_DTYPE = 2,       /* not one of ak_dtype, or of ak_label_dtype for labels */
  AK_BAD_SCALE = 3,       /* not finite, or not > 0 */
  AK_MISSING_POINTER = 4, /* a required pointer is NULL */
  AK_SMALL_WORKSPACE = 5, /* fewer bytes than the workspace query asks for */
  AK_UNKNOWN_ISA = 6,     /* no such instruction set in this library */
  AK_UNSUPPORTED_ISA = 7, /* compiled in, but this processor or system lacks it */
  AK_NO_MEMORY = 8,       /* the system refused memory or a thread */
  AK_BAD_RELATION = 9     /* not one of ak_relation, or one of them without labels */
};

/* English text for a status; never NULL. */
AK_API const char* ak_status_message(int status);

/* ---------------------------------------------------------------- CPU: instruction sets */

/* Name of the instruction set in use ("avx512bf16", "avx512", "avx2", "portable"). On first use it is the one named
 * by the environment variable ACTION_KERNELS_CPU_ISA, else the best that the processor supports. Case, and space
 * around a name, do not matter. */
AK_API const char* ak_cpu_isa(void);

/* Use the named one from now on, in all threads; NULL or "auto": the best supported.
 * Returns AK_UNKNOWN_ISA or AK_UNSUPPORTED_ISA and changes nothing if it cannot be had. */
AK_API int ak_cpu_set_isa(const char* name);

/* Names that ak_cpu_set_isa accepts here, comma-separated, best first. */
AK_API const char* ak_cpu_supported_isas(void);

/* Status of the choice by environment variable: AK_OK, AK_UNKNOWN_ISA or AK_UNSUPPORTED_ISA. */
AK_API int ak_cpu_isa_status(void);

/* File of the OpenMP runtime whose functions this library is bound to; it should be torch's. */
AK_API const char* ak_cpu_openmp_library(void);

/* ---------------------------------------------------------------- CPU: pairwise_lse */

/* Rows of a (rows, dim) matrix. Rows with mask[i] == 0, or with labels[i] < 0, are left out; what they hold is
 * never used. One of mask and labels is NULL. */
typedef struct ak_rows {
  const void* data;
  const uint8_t* mask; /* NULL: every row takes part */
  int64_t rows;
  int64_t row_stride; /* in elements */
  int32_t dtype;      /* ak_dtype */
  const int64_t* labels; /* classes; NULL where no relation is asked for */
} ak_rows;

/* Which pairs count, by their labels. */
enum ak_relation { AK_ANY_CLASS = 0, AK_SAME_CLASS = 1, AK_DIFFERENT_CLASS = 2 };

enum ak_pass { AK_FORWARD = 0, AK_GRAD_ANCHORS = 1, AK_GRAD_KEYS = 2, AK_GRAD_OFFSETS = 4 };

/* Bytes of workspace for a pass: AK_FORWARD, or the sum of the gradients wanted. Negative: −ak_status.
 * It depends on the instruction set in use, the thread count and the shapes, not on the data. */
AK_API int64_t ak_cpu_pairwise_lse_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                             int allow_bfloat16, int pass, int threads);

/* Bytes that a forward pass can leave to the backward pass on the same rows, so that scores are not computed
 * twice; 0 where that does not pay (keys of their own, few columns, more than 32 MiB). Negative: −ak_status. */
AK_API int64_t ak_cpu_pairwise_lse_kept(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                        int allow_bfloat16, int threads);

/* lse[i] = log Σ_j exp(scale · anchors_i · keys_j) over the keys that take part. keys == NULL: the
 * anchors are their own keys and j == i is left out. −inf for an anchor without a key, 0 for one that
 * the mask leaves out. Writes all of lse[0 … anchors->rows). `threads` ≥ 1 is an upper bound. The
 * result does not depend on timing; it is the same for 1 to 4 threads.
 *
 * Where the instruction set multiplies pairs of bfloat16 (avx512bf16), bfloat16 rows are multiplied as
 * they are and, if `allow_bfloat16`, float32 rows are rounded to bfloat16 first (2^-9 relative); the
 * backward pass rounds its weights too. Sums are float32. Elsewhere products are float32's.
 *
 * `kept` of `kept_bytes` bytes, or NULL: filled for the backward pass, which may be given the same or NULL.
 * What it cannot use (another instruction set or thread count since) it computes again. */
AK_API int ak_cpu_pairwise_lse_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                       double scale, int allow_bfloat16, float* lse, void* kept,
                                       int64_t kept_bytes, int threads, void* workspace,
                                       int64_t workspace_bytes);

/* Gradients of Σ_i grad_lse[i] · lse[i]: grad_anchors (anchors->rows, dim) and grad_keys
 * (keys->rows, dim), contiguous, in the dtype of their rows, every element written; NULL for one that
 * is not wanted. keys == NULL: grad_anchors holds both parts and grad_keys must be NULL. grad_lse of
 * anchors that are left out is not used. */
AK_API int ak_cpu_pairwise_lse_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                        double scale, int allow_bfloat16, const float* grad_lse,
                                        const float* lse, void* kept, int64_t kept_bytes,
                                        void* grad_anchors, void* grad_keys, int threads,
                                        void* workspace, int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: pairs by their classes */

/* These take rows with labels, and a relation AK_SAME_CLASS or AK_DIFFERENT_CLASS: a pair counts if the labels
 * of anchor and key are so related (and, where keys == NULL, j != i). Everything else is as above. */

/* Bytes of workspace for a pass. Negative: −ak_status. */
AK_API int64_t ak_cpu_labelled_lse_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                             int allow_bfloat16, int pass, int threads);

/* lse[i] = log Σ_j exp(scale · anchors_i · keys_j) over the pairs that count; −inf where none does, 0 for an
 * anchor without a label. */
AK_API int ak_cpu_labelled_lse_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale,
                                       int relation, int allow_bfloat16, float* lse, int threads,
                                       void* workspace, int64_t workspace_bytes);

AK_API int ak_cpu_labelled_lse_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                        double scale, int relation, int allow_bfloat16,
                                        const float* grad_lse, const float* lse, void* grad_anchors,
                                        void* grad_keys, int threads, void* workspace,
                                        int64_t workspace_bytes);

/* Bytes of workspace for a pass; AK_GRAD_OFFSETS alone, or with others, needs no more of its own. */
AK_API int64_t ak_cpu_pairwise_softplus_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                                  int allow_bfloat16, int pass, int threads);

/* values[i] = Σ_j log(1 + exp(x_ij)) over the pairs that count, 0 where none does, with
 * x_ij = offsets[i] − scale · anchors_i · keys_j if they are of the same class, else offsets[i] + scale · …. */
AK_API int ak_cpu_pairwise_softplus_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                            double scale, int relation, int allow_bfloat16,
                                            const float* offsets, float* values, int threads,
                                            void* workspace, int64_t workspace_bytes);

/* Gradients of Σ_i grad_values[i] · values[i]; grad_offsets (anchors->rows), or NULL if not wanted. */
AK_API int ak_cpu_pairwise_softplus_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                             double scale, int relation, int allow_bfloat16,
                                             const float* offsets, const float* grad_values,
                                             void* grad_anchors, void* grad_keys, float* grad_offsets,
                                             int threads, void* workspace, int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: center_lse */

/* Bytes of workspace, for either pass over any number of rows, or minus an ak_status. */
AK_API int64_t ak_cpu_center_lse_workspace(int64_t dim, int64_t count, int threads);

/* lse[i] = log Σ_c exp(scale · rows_i · centers_c) and probabilities[i, c] = exp(scale · rows_i · centers_c − lse[i]),
 * (rows->rows, count) contiguous; both 0 for a row that the mask leaves out. centers is (count, dim) contiguous,
 * count ≥ 1; rows have no labels. */
AK_API int ak_cpu_center_lse_forward(const ak_rows* rows, int64_t dim, const float* centers, int64_t count,
                                     double scale, float* lse, float* probabilities, int threads, void* workspace,
                                     int64_t workspace_bytes);

/* grad_rows[i] = scale · grad_lse[i] · Σ_c probabilities[i, c] · centers_c, (rows, dim) contiguous in `dtype`, 0 for a
 * row that mask leaves out, which may be NULL. */
AK_API int ak_cpu_center_lse_backward(int64_t rows, int64_t dim, const uint8_t* mask, const float* centers,
                                      int64_t count, double scale, const float* grad_lse, const float* probabilities,
                                      void* grad_rows, int dtype, int threads, void* workspace,
                                      int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: prepare_rows */

/* A channels-first map (batch, dim, pixels), or with pixels == 1 the rows of a (batch, dim) matrix;
 * contiguous. */
typedef struct ak_map {
  const void* data;
  int64_t batch;
  int64_t dim;
  int64_t pixels;
  int32_t dtype; /* ak_dtype */
} ak_map;

/* rows[i] = factors[i] · x_i for pixel i in (batch, pixels) order, (batch · pixels, dim) of dtype
 * rows_dtype; factors[i] = 1 / ‖x_i‖ (0 where the norm is below 1e-12), 1 if not normalising, and 0
 * with a zero row where mask[i] == 0. mask may be NULL. */
AK_API int ak_cpu_prepare_rows_forward(const ak_map* map, const uint8_t* mask, int normalize,
                                       void* rows, int rows_dtype, float* factors, int threads);

/* grad_map = f · (g − r (r · g)) with r = f · x, or f · g if not normalising; g = grad_rows
 * (batch · pixels, dim) of dtype rows_dtype, f = factors of the forward pass. grad_map has the form and
 * dtype of map. A pixel with factor 0 gets 0, whatever its values and its g are. */
AK_API int ak_cpu_prepare_rows_backward(const ak_map* map, const void* grad_rows, int rows_dtype,
                                        const float* factors, int normalize, void* grad_map,
                                        int threads);

/* ---------------------------------------------------------------- CPU: sample_pixels */

/* What to draw, and from what; arrays are contiguous. A pixel is a candidate of the class that is its
 * label if 0 <= label < classes, the mask does not leave it out, and, with scores, its probability of
 * that class is < threshold (as float32). */
typedef struct ak_sampling {
  const void* scores;  /* (batch, classes, pixels); NULL: whatever the probability */
  const void* labels;  /* (batch, pixels) */
  const uint8_t* mask; /* (batch, pixels), 0 leaves a pixel out; NULL: none is */
  int64_t batch;
  int64_t pixels; /* of one image; batch * pixels < 2^31 */
  int64_t classes;
  int64_t samples; /* of every class; classes * samples <= 2^32 */
  uint64_t seed;
  double threshold;
  int32_t scores_dtype; /* ak_dtype */
  int32_t labels_dtype; /* ak_label_dtype */
  int32_t from_logits;  /* 0: scores are probabilities */
} ak_sampling;

/* Bytes of workspace for sample_pixels. Negative: −ak_status. It depends on the shapes alone. */
AK_API int64_t ak_cpu_sample_pixels_workspace(const ak_sampling* sampling);

/* counts[c] = candidates of class c; index[c, q] = flat pixel, in (batch, pixels) order, of draw q: the
 * candidate of rank floor(u * counts[c] / 2^32), u the first word of Philox 4x32-10 with key `seed` and
 * counter (c * samples + q, 0, 0, 0); −1 where counts[c] == 0. Writes all of index (classes, samples) and
 * counts (classes). The result does not depend on the thread count. */
AK_API int ak_cpu_sample_pixels(const ak_sampling* sampling, int64_t* index, int64_t* counts, int threads,
                                void* workspace, int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: sampled_features */

/* Pixels of the map that results from upsampling a coarse one (linear in every axis, corners on corners), whose
 * 3 x 3 (x 3) neighbourhoods are wanted. Two-dimensional maps have coarse[0] == fine[0] == 1. */
typedef struct ak_neighbourhoods {
  const int64_t* index; /* flat pixels in (batch, fine) order; outside of them: absent */
  int64_t count;
  int64_t batch;
  int64_t channels;
  const int64_t* coarse; /* sizes of the three axes */
  const int64_t* fine;   /* none below coarse */
  int32_t axes;    /* 2 or 3 */
  int32_t dtype;   /* ak_dtype, of features, neighbourhoods and gradients */
} ak_neighbourhoods;

/* out (count, 3^axes, channels), contiguous: for every pixel and tap of a convolution's kernel (last axis fastest)
 * the upsampled features; 0 beyond the border and for an absent pixel. `strides` of features, in elements: image,
 * channel and the three axes; neighbouring channels one apart are the fast case. */
AK_API int ak_cpu_sampled_features_forward(const ak_neighbourhoods* what, const void* features,
                                           const int64_t* strides, void* out, int threads);

/* Bytes of workspace for the backward pass. Negative: −ak_status. It depends on shapes and threads alone. */
AK_API int64_t ak_cpu_sampled_features_workspace(const ak_neighbourhoods* what, int threads);

/* The adjoint: gradient of the features from grad (count, 3^axes, channels), contiguous. Every element is written,
 * in (batch, channels, coarse) order, or (batch, coarse, channels) if channels_last. Sums are float32, in the order
 * of the index: the result does not depend on the thread count. */
AK_API int ak_cpu_sampled_features_backward(const ak_neighbourhoods* what, const void* grad, int channels_last,
                                            void* gradient, int threads, void* workspace, int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: class_sums */

/* Labels of an upsampled map (see ak_neighbourhoods), and the sizes of the map that is upsampled. */
typedef struct ak_class_maps {
  const int64_t* labels; /* (batch, fine), contiguous; a pixel whose label is no class counts nowhere */
  int64_t batch;
  int64_t channels;
  int64_t classes;
  const int64_t* coarse; /* sizes of the three axes */
  const int64_t* fine;   /* none below coarse */
  int32_t axes;          /* 2 or 3 */
  int32_t dtype;         /* ak_dtype, of the features */
} ak_class_maps;

/* Bytes of workspace. Negative: −ak_status. It depends on shapes and threads alone. */
AK_API int64_t ak_cpu_class_sums_workspace(const ak_class_maps* what, int threads);

/* sums (classes, channels, 3^axes): over the pixels of a class what each tap of a convolution's kernel reads of the
 * upsampled features, 0 beyond the border. `strides` as in sampled_features. The result does not depend on the
 * thread count. */
AK_API int ak_cpu_class_sums(const ak_class_maps* what, const void* features, const int64_t* strides, float* sums,
                             int threads, void* workspace, int64_t workspace_bytes);

/* ---------------------------------------------------------------- CPU: indexed_lse */

/* Bytes of workspace. Negative: −ak_status. It depends on the instruction set in use, shapes and threads. */
AK_API int64_t ak_cpu_indexed_lse_workspace(const ak_rows* queries, const ak_rows* bank, int64_t dim, int64_t runs,
                                            int64_t columns, int threads);

/* lse[i] = log Σ_j exp(scale · queries_i · bank_{index[r, j]}), −inf where nothing is summed; and where mean is not
 * NULL, mean (queries, dim) = Σ_j exp(scale · queries_i · bank_j − lse[i]) bank_j, 0 where nothing is summed.
 * index (runs, columns) is contiguous, one outside of the bank is left out; runs divides the queries, and each run
 * of queries->rows / runs consecutive ones has a row r. Masks are not used. The result does not depend on the
 * thread count. */
AK_API int ak_cpu_indexed_lse(const ak_rows* queries, const ak_rows* bank, int64_t dim, const int64_t* index,
                              int64_t runs, int64_t columns, double scale, float* lse, float* mean, int threads,
                              void* workspace, int64_t workspace_bytes);

#ifdef __cplusplus
}
#endif

#endif

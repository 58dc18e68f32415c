/* The C interface of libaction_kernels_cuda.
 *
 * Every function takes the ordinal of the device and a cudaStream_t (as void*), launches there and
 * returns without waiting: 0, a negative code of this library, or a positive cudaError_t
 * (ak_cuda_error_message tells both). The current device of the calling thread is kept. All memory is
 * the caller's; the library allocates none.
 */
#ifndef ACTION_KERNELS_CUDA_H
#define ACTION_KERNELS_CUDA_H

#include <stdint.h>

#define AK_CUDA_ABI_VERSION 3

#define AK_CUDA_FLOAT32 0
#define AK_CUDA_FLOAT16 1
#define AK_CUDA_BFLOAT16 2
#define AK_CUDA_FLOAT64 3 /* scores of sample_pixels only */

/* labels */
#define AK_CUDA_INT64 0
#define AK_CUDA_INT32 1
#define AK_CUDA_INT16 2
#define AK_CUDA_INT8 3
#define AK_CUDA_UINT8 4

#define AK_CUDA_BAD_DTYPE (-1)
#define AK_CUDA_BAD_SHAPE (-2)
#define AK_CUDA_NO_KERNEL (-3) /* the library was not built for this device */

#ifdef __cplusplus
extern "C" {
#endif

int ak_cuda_abi_version(void);
const char *ak_cuda_error_message(int code);

/* Architectures the library holds machine code for, as nvcc numbers them: "800,900" for 8.0 and 9.0. */
const char *ak_cuda_architectures(void);

/* What the kernels run on: "cuda", or "cpu" in a build for tests that emulates them. */
const char *ak_cuda_device_type(void);

/* rows[i] = factors[i] * x_i with factors[i] = 1 / norm, 1 (normalize == 0), or 0 for a row that the
 * mask leaves out (its values are not used) or whose norm is below 1e-12.
 * features: (batch, dim, spatial); spatial == 1 makes it a (batch, dim) matrix.
 * rows: (batch * spatial, dim), pixels in (batch, spatial) order. mask: bytes or NULL.
 */
int ak_cuda_prepare_rows_forward(int device, void *stream, const void *features, int features_dtype,
                                 int64_t batch, int64_t dim, int64_t spatial, const uint8_t *mask,
                                 int normalize, void *rows, int rows_dtype, float *factors);

/* grad_features (batch, dim, spatial), of the features' dtype: f (g - r (r . g)) with r = f x where
 * normalize, else f g; zero where factors[i] == 0. */
int ak_cuda_prepare_rows_backward(int device, void *stream, const void *grad_rows, int rows_dtype,
                                  const void *features, int features_dtype, const float *factors,
                                  int64_t batch, int64_t dim, int64_t spatial, int normalize,
                                  void *grad_features);

/* Rows of float16 or bfloat16 as pairwise_lse takes them: (rows, dim), contiguous, at a multiple of 16
 * bytes; dim is 64, 128 or 256. Where only some take part, these come first and the others are zero. */
typedef struct ak_cuda_rows {
  const void *values;
  const int32_t *taking_part; /* on the device: how many; NULL: all */
  const int32_t *index;       /* where each comes from; NULL: in order */
  int64_t rows;
} ak_cuda_rows;

/* Packs `rows` rows of 16-bit numbers (strides in elements) into values (rows, width), zeros past dim.
 * mask, or NULL: bytes; taken[i] = how many of mask[0 ... i] are set; index (rows) is written. */
int ak_cuda_pack_rows(int device, void *stream, const void *source, int64_t rows, int64_t dim,
                      int64_t row_stride, int64_t column_stride, const uint8_t *mask,
                      const int32_t *taken, void *values, int64_t width, int32_t *index);

/* How exponents are kept in range. */
#define AK_CUDA_ONLINE 0    /* by the largest so far, backward by the lse */
#define AK_CUDA_FIXED 1     /* they are within +-63 in base 2 */
#define AK_CUDA_SYMMETRIC 2 /* fixed, without keys: each pair once, added atomically */

/* Into how many parts to split the work over the other rows so that the device is full, at most `most`;
 * negative: an error. */
int64_t ak_cuda_pairwise_lse_splits(int device, int64_t rows, int64_t other_rows, int64_t dim, int backward,
                                    int form, int64_t most);

/* lse[s][i] = log sum_j exp(scale anchors_i . keys_j) over the s-th of `splits` parts of the keys, 0 for
 * anchors that take no part; without keys (NULL) the anchors are their own and j != i. `scale_tensor`, if
 * not NULL, is another factor, read on the device. AK_CUDA_SYMMETRIC: `sums` (anchors) are zeros on
 * entry, lse is of all keys. */
int ak_cuda_pairwise_lse_forward(int device, void *stream, const ak_cuda_rows *anchors,
                                 const ak_cuda_rows *keys, int dtype, int64_t dim, float scale,
                                 const float *scale_tensor, int form, int splits, float *sums, float *lse);

/* The anchors' terms of a gradient, in the order of the packed rows and none up to `padded`: weights and,
 * unless AK_CUDA_FIXED, shifts. peak: largest |grad_lse| (float16), or NULL. */
int ak_cuda_pairwise_lse_terms(int device, void *stream, const ak_cuda_rows *anchors, const float *lse,
                               const float *grad_lse, const float *peak, int form, int64_t padded,
                               float *weights, float *shifts);

/* gradient_i = scale sum_j G_ij other_j, (own rows, columns), zero for rows that take no part; or of each
 * split partial (splits, own rows, columns) in float32. Without `other` (NULL) the rows are their own
 * keys. Terms are those of pairwise_lse_terms, padded to whole tiles of 128; zeros for keys. */
int ak_cuda_pairwise_lse_backward(int device, void *stream, const ak_cuda_rows *own, const ak_cuda_rows *other,
                                  int dtype, int64_t dim, float scale, const float *scale_tensor, int form,
                                  const float *own_weights, const float *own_shifts, const float *other_weights,
                                  const float *other_shifts, const float *peak, int splits, int64_t columns,
                                  void *gradient, float *partial);

/* What to draw, and from what. A pixel is a candidate of the class that is its label if 0 <= label <
 * classes, the mask does not leave it out, and, with scores, its probability of that class is < threshold. */
typedef struct ak_cuda_draw {
  const void *scores;  /* (batch, classes, pixels), strides in elements; NULL: whatever the probability */
  const void *labels;  /* (batch, pixels), contiguous */
  const uint8_t *mask; /* (batch, pixels), 0 leaves a pixel out; NULL: none is */
  const int64_t *seed; /* on the device */
  int64_t batch;
  int64_t pixels;  /* of one image; batch * pixels < 2^31 */
  int64_t classes;
  int64_t samples; /* of every class; classes * samples <= 2^32 */
  int64_t image_stride;
  int64_t class_stride;
  int64_t pixel_stride;
  double threshold;
  int32_t scores_dtype;
  int32_t labels_dtype;
  int32_t from_logits; /* 0: scores are probabilities */
} ak_cuda_draw;

#define AK_CUDA_SAMPLING_BLOCK 512

/* totals[c] = candidates of class c; index[c][q] = flat pixel of draw q: the candidate of rank
 * floor(u * totals[c] / 2^32), u the first word of Philox 4x32-10 with key *seed and counter
 * (c * samples + q, 0, 0, 0); -1 where there is no candidate. classes (batch * pixels) is workspace, and
 * counts (classes, pixels in blocks of AK_CUDA_SAMPLING_BLOCK), zeros on entry. */
int ak_cuda_sample_pixels(int device, void *stream, const ak_cuda_draw *draw, int32_t *classes, int32_t *counts,
                          int64_t *totals, int64_t *index);

/* Bytes of shared memory that center_lse takes; at most 48 KiB are served. */
int64_t ak_cuda_center_lse_bytes(int64_t centers, int64_t dim);

/* lse[i] = log sum_c exp(scale rows_i . centers_c) and probabilities[i][c] = exp(logit - lse), 0 for rows that the
 * mask (or NULL) leaves out. rows (count, dim) and centers (center_count, dim, float32), contiguous.
 * `scale_tensor`: another factor, or NULL. */
int ak_cuda_center_lse_forward(int device, void *stream, const void *rows, int dtype, int64_t count, int64_t dim,
                               const float *centers, int64_t center_count, const uint8_t *mask, float scale,
                               const float *scale_tensor, float *lse, float *probabilities);

/* gradient (count, dim) of sum_i grad_lse[i] lse[i] with respect to the rows. */
int ak_cuda_center_lse_backward(int device, void *stream, int64_t count, int64_t dim, const float *centers,
                                int64_t center_count, const uint8_t *mask, float scale,
                                const float *scale_tensor, const float *grad_lse, const float *probabilities,
                                void *gradient, int gradient_dtype);

#ifdef __cplusplus
}
#endif
#endif

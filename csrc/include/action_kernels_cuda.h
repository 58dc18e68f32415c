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

#define AK_CUDA_ABI_VERSION 2

#define AK_CUDA_FLOAT32 0
#define AK_CUDA_FLOAT16 1
#define AK_CUDA_BFLOAT16 2

#define AK_CUDA_BAD_DTYPE (-1)
#define AK_CUDA_BAD_SHAPE (-2)

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

#ifdef __cplusplus
}
#endif
#endif

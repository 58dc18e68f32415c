// Rows of unit norm from a matrix or a channels-first map, and the way back.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "device.cuh"

namespace ak {
namespace {

constexpr float kMinimumNorm = 1e-12f;
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kTile = 32;  // pixels and channels of a transposed tile
constexpr int64_t kMostBlocks = INT32_MAX;
// A power of two that brings the squares of any row's values into float32's range, and its rows' own.
constexpr float kShrinking = 0x1p-100f;

__device__ float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

/// A row is (x * shrink) * factor; shrink is 1, or kShrinking where squares of its values overflow.
struct RowScale {
  float shrink = 1.0f;
  float factor = 1.0f;
  __device__ bool is_left_out() const { return factor == 0.0f; }
  __device__ float operator()(float x) const { return x * shrink * factor; }
};

__device__ bool is_finite(float square_sum) { return square_sum <= FLT_MAX; }  // not NaN either

/// 1 / norm; 0 for a norm that is taken for 0, NaN for a row that holds NaN or an infinity.
__device__ float inverse_norm(float square_sum, float shrink) {
  const float norm = sqrtf(square_sum);
  if (shrink == 1.0f && norm < kMinimumNorm) return 0.0f;
  return norm <= FLT_MAX ? 1.0f / norm : NAN;
}

// ---- matrices (n, d): a warp a row ----

template <typename In>
__device__ float squares_of_row(const In *row, int64_t d, float shrink) {
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % kWarp; c < d; c += kWarp) {
    const float value = to_float(row[c]) * shrink;
    sum += value * value;
  }
  return warp_sum(sum);
}

template <typename In, typename Out>
__global__ void rows_forward(const In *x, int64_t n, int64_t d, const uint8_t *mask, bool normalize,
                             Out *rows, float *factors) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= n) return;
  const bool valid = mask == nullptr || mask[row];
  RowScale scale;
  if (valid && normalize) {
    float sum = squares_of_row(x + row * d, d, 1.0f);
    if (!is_finite(sum)) {
      scale.shrink = kShrinking;
      sum = squares_of_row(x + row * d, d, kShrinking);
    }
    scale.factor = inverse_norm(sum, scale.shrink);
  }
  if (!valid) scale.factor = 0.0f;
  for (int64_t c = lane; c < d; c += kWarp) {
    // a row left out may hold NaN: it is not read
    const float value = scale.is_left_out() ? 0.0f : scale(to_float(x[row * d + c]));
    rows[row * d + c] = from_float<Out>(value);
  }
  if (lane == 0) factors[row] = scale.shrink * scale.factor;
}

template <typename In, typename Out>
__global__ void rows_backward(const Out *grad_rows, const In *x, const float *factors, int64_t n,
                              int64_t d, bool normalize, In *grad_x) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= n) return;
  const float factor = factors[row];
  float dot = 0.0f;  // r . g
  if (factor != 0.0f && normalize) {
    for (int64_t c = lane; c < d; c += kWarp)
      dot += to_float(grad_rows[row * d + c]) * (to_float(x[row * d + c]) * factor);
    dot = warp_sum(dot);
  }
  for (int64_t c = lane; c < d; c += kWarp) {
    float value = 0.0f;
    if (factor != 0.0f) {
      value = to_float(grad_rows[row * d + c]);
      if (normalize) value -= to_float(x[row * d + c]) * factor * dot;
      value *= factor;
    }
    grad_x[row * d + c] = from_float<In>(value);
  }
}

// ---- maps (batch, d, spatial): a block a tile of pixels; tiles are transposed in shared memory so
// that both sides are read and written along their contiguous axis ----

__device__ float sum_over_warps(float partial, float (&shared)[kWarpsPerBlock][kTile]) {
  shared[threadIdx.y][threadIdx.x] = partial;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kWarpsPerBlock; ++w) sum += shared[w][threadIdx.x];
  __syncthreads();
  return sum;
}

/// Of the pixel of the thread's column, over all warps; 0 for one that does not take part.
template <typename In>
__device__ float squares_of_pixel(const In *column, int64_t d, int64_t spatial, bool takes_part,
                                  float shrink, float (&partial)[kWarpsPerBlock][kTile]) {
  float sum = 0.0f;
  for (int64_t c = threadIdx.y; takes_part && c < d; c += kWarpsPerBlock) {
    const float value = to_float(column[c * spatial]) * shrink;
    sum += value * value;
  }
  return sum_over_warps(sum, partial);
}

template <typename In, typename Out>
__global__ void map_forward(const In *x, int64_t d, int64_t spatial, const uint8_t *mask,
                            bool normalize, Out *rows, float *factors) {
  __shared__ float partial[kWarpsPerBlock][kTile];
  __shared__ float tile[kTile][kTile + 1];
  const int64_t tiles = (spatial + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;
  const int64_t pixel = first + threadIdx.x;
  const bool valid =
      pixel < spatial && (mask == nullptr || mask[image * spatial + pixel]);
  const In *column = x + image * d * spatial + pixel;
  RowScale scale;
  if (normalize) {
    float sum = squares_of_pixel(column, d, spatial, valid, 1.0f, partial);
    // Every warp holds the same sums, so that all of the block agree whether to go on.
    if (__ballot_sync(~0u, !is_finite(sum)) != 0) {
      if (!is_finite(sum)) scale.shrink = kShrinking;
      sum = squares_of_pixel(column, d, spatial, valid, scale.shrink, partial);
    }
    scale.factor = inverse_norm(sum, scale.shrink);
  }
  if (!valid) scale.factor = 0.0f;
  if (threadIdx.y == 0 && pixel < spatial) {
    factors[image * spatial + pixel] = scale.shrink * scale.factor;
  }
  for (int64_t channel = 0; channel < d; channel += kTile) {
    for (int c = threadIdx.y; c < kTile; c += kWarpsPerBlock) {
      const bool inside = !scale.is_left_out() && channel + c < d;
      tile[c][threadIdx.x] = inside ? scale(to_float(column[(channel + c) * spatial])) : 0.0f;
    }
    __syncthreads();
    const int64_t c = channel + threadIdx.x;
    for (int p = threadIdx.y; p < kTile; p += kWarpsPerBlock)
      if (first + p < spatial && c < d)
        rows[(image * spatial + first + p) * d + c] = from_float<Out>(tile[threadIdx.x][p]);
    __syncthreads();
  }
}

/// Gradients of a tile of pixels and channels, transposed into tile[channel][pixel].
template <typename Out>
__device__ void load_gradient_tile(const Out *grad_rows, int64_t first, int64_t spatial,
                                   int64_t channel, int64_t d, float (&tile)[kTile][kTile + 1]) {
  const int64_t c = channel + threadIdx.x;
  for (int p = threadIdx.y; p < kTile; p += kWarpsPerBlock) {
    const bool inside = first + p < spatial && c < d;
    tile[threadIdx.x][p] = inside ? to_float(grad_rows[(first + p) * d + c]) : 0.0f;
  }
  __syncthreads();
}

template <typename In, typename Out>
__global__ void map_backward(const Out *grad_rows, const In *x, const float *factors, int64_t d,
                             int64_t spatial, bool normalize, In *grad_x) {
  __shared__ float partial[kWarpsPerBlock][kTile];
  __shared__ float tile[kTile][kTile + 1];
  const int64_t tiles = (spatial + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;
  const int64_t pixel = first + threadIdx.x;
  const float factor = pixel < spatial ? factors[image * spatial + pixel] : 0.0f;
  const In *column = x + image * d * spatial + pixel;
  In *grad_column = grad_x + image * d * spatial + pixel;
  const Out *grad_image = grad_rows + image * spatial * d;
  float dot = 0.0f;  // r . g
  if (normalize) {
    for (int64_t channel = 0; channel < d; channel += kTile) {
      load_gradient_tile(grad_image, first, spatial, channel, d, tile);
      for (int c = threadIdx.y; c < kTile; c += kWarpsPerBlock)
        if (factor != 0.0f && channel + c < d)
          dot += tile[c][threadIdx.x] * (to_float(column[(channel + c) * spatial]) * factor);
      __syncthreads();
    }
    dot = sum_over_warps(dot, partial);
  }
  for (int64_t channel = 0; channel < d; channel += kTile) {
    load_gradient_tile(grad_image, first, spatial, channel, d, tile);
    for (int c = threadIdx.y; c < kTile; c += kWarpsPerBlock) {
      if (pixel >= spatial || channel + c >= d) continue;
      float value = 0.0f;
      if (factor != 0.0f) {
        value = tile[c][threadIdx.x];
        if (normalize) value -= to_float(column[(channel + c) * spatial]) * factor * dot;
        value *= factor;
      }
      grad_column[(channel + c) * spatial] = from_float<In>(value);
    }
    __syncthreads();
  }
}

int64_t map_blocks(int64_t batch, int64_t spatial) { return batch * ((spatial + kTile - 1) / kTile); }

int64_t row_blocks(int64_t n) { return (n + kWarpsPerBlock - 1) / kWarpsPerBlock; }

bool bad_shape(int64_t batch, int64_t dim, int64_t spatial) {
  return batch < 0 || dim < 0 || spatial < 0 ||
         (spatial == 1 ? row_blocks(batch) : map_blocks(batch, spatial)) > kMostBlocks;
}

}  // namespace
}  // namespace ak

AK_EXPORT int ak_cuda_prepare_rows_forward(int device, void *stream, const void *features,
                                           int features_dtype, int64_t batch, int64_t dim,
                                           int64_t spatial, const uint8_t *mask, int normalize,
                                           void *rows, int rows_dtype, float *factors) {
  using namespace ak;
  if (bad_shape(batch, dim, spatial)) return AK_CUDA_BAD_SHAPE;
  if (batch * spatial == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_dtype(features_dtype, [&](auto in) {
    return with_dtype(rows_dtype, [&](auto out) -> int {
      using In = typename decltype(in)::type;
      using Out = typename decltype(out)::type;
      const auto *x = static_cast<const In *>(features);
      auto *y = static_cast<Out *>(rows);
      if (spatial == 1) {
        rows_forward<<<unsigned(row_blocks(batch)), kWarp * kWarpsPerBlock, 0, queue>>>(
            x, batch, dim, mask, normalize != 0, y, factors);
      } else {
        map_forward<<<unsigned(map_blocks(batch, spatial)), dim3(kTile, kWarpsPerBlock), 0, queue>>>(
            x, dim, spatial, mask, normalize != 0, y, factors);
      }
      return cudaGetLastError();
    });
  });
}

AK_EXPORT int ak_cuda_prepare_rows_backward(int device, void *stream, const void *grad_rows,
                                            int rows_dtype, const void *features,
                                            int features_dtype, const float *factors, int64_t batch,
                                            int64_t dim, int64_t spatial, int normalize,
                                            void *grad_features) {
  using namespace ak;
  if (bad_shape(batch, dim, spatial)) return AK_CUDA_BAD_SHAPE;
  if (batch * spatial == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_dtype(features_dtype, [&](auto in) {
    return with_dtype(rows_dtype, [&](auto out) -> int {
      using In = typename decltype(in)::type;
      using Out = typename decltype(out)::type;
      const auto *g = static_cast<const Out *>(grad_rows);
      const auto *x = static_cast<const In *>(features);
      auto *grad_x = static_cast<In *>(grad_features);
      if (spatial == 1) {
        rows_backward<<<unsigned(row_blocks(batch)), kWarp * kWarpsPerBlock, 0, queue>>>(
            g, x, factors, batch, dim, normalize != 0, grad_x);
      } else {
        map_backward<<<unsigned(map_blocks(batch, spatial)), dim3(kTile, kWarpsPerBlock), 0, queue>>>(
            g, x, factors, dim, spatial, normalize != 0, grad_x);
      }
      return cudaGetLastError();
    });
  });
}

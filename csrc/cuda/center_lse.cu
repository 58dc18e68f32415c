// center_lse: log-sum-exp over a few centres and its gradient, a warp a row. The centres lie in shared
// memory; a row is read once for all its logits, and the backward pass reads their probabilities instead.
#include "device.cuh"

namespace ak {
namespace {

constexpr int kWarp = 32, kWarps = 8;
constexpr int64_t kMostBlocks = 4096;  // of which each takes several rows, and the centres once
constexpr int64_t kMostShared = 48 << 10;

struct CenterProblem {
  int64_t rows, dim, centers;
  const float *values;  // (centers, dim)
  const uint8_t *mask;  // or null
  float scale;
  const float *scale_tensor;  // another factor, or null

  __device__ float factor() const { return scale_tensor ? scale * *scale_tensor : scale; }
};

__device__ float sum_over_lanes(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ void load_centers(const CenterProblem &p, float *centers) {
  for (int64_t i = threadIdx.x; i < p.centers * p.dim; i += kWarp * kWarps) centers[i] = p.values[i];
  __syncthreads();
}

template <typename T>
__device__ float logit(const CenterProblem &p, const T *row, const float *center, float factor) {
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % kWarp; c < p.dim; c += kWarp) sum += to_float(row[c]) * center[c];
  return sum_over_lanes(sum) * factor;
}

/// probabilities (rows, centers): e^(logit - lse), 0 for rows that take no part.
template <typename T>
__global__ void center_forward(const CenterProblem p, const T *rows, float *lse, float *probabilities) {
  extern __shared__ __align__(16) float shared[];
  load_centers(p, shared);
  float *logits = shared + p.centers * p.dim + threadIdx.x / kWarp * p.centers;  // of this warp's row
  const float factor = p.factor();
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < p.rows; i += step) {
    const bool takes_part = p.mask == nullptr || p.mask[i];
    float maximum = -INFINITY, total = 0.0f;
    for (int64_t c = 0; takes_part && c < p.centers; ++c) {
      const float x = logit(p, rows + i * p.dim, shared + c * p.dim, factor), larger = fmaxf(maximum, x);
      total = total * expf(maximum - larger) + expf(x - larger);
      maximum = larger;
      if (lane == 0) logits[c] = x;
    }
    __syncwarp();
    for (int64_t c = lane; c < p.centers; c += kWarp)
      probabilities[i * p.centers + c] = takes_part ? expf(logits[c] - maximum) / total : 0.0f;
    if (lane == 0) lse[i] = takes_part ? maximum + logf(total) : 0.0f;
    __syncwarp();
  }
}

/// gradient_i = scale g_i sum_c p_ic centers_c, 0 for rows that take no part
template <typename Out>
__global__ void center_backward(const CenterProblem p, const float *grad_lse, const float *probabilities,
                                Out *gradient) {
  extern __shared__ __align__(16) float shared[];
  load_centers(p, shared);
  const float factor = p.factor();
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < p.rows; i += step) {
    const bool takes_part = p.mask == nullptr || p.mask[i];
    const float weight = takes_part ? factor * grad_lse[i] : 0.0f;
    for (int64_t d = threadIdx.x % kWarp; d < p.dim; d += kWarp) {
      float sum = 0.0f;
      for (int64_t c = 0; c < p.centers; ++c) sum += probabilities[i * p.centers + c] * shared[c * p.dim + d];
      gradient[i * p.dim + d] = from_float<Out>(takes_part ? weight * sum : 0.0f);
    }
  }
}

bool bad_shape(const CenterProblem &p) {
  return p.rows < 0 || p.dim < 1 || p.centers < 1 || ak_cuda_center_lse_bytes(p.centers, p.dim) > kMostShared;
}

unsigned blocks_of(int64_t rows) { return unsigned(min((rows + kWarps - 1) / kWarps, kMostBlocks)); }

}  // namespace
}  // namespace ak

AK_EXPORT int64_t ak_cuda_center_lse_bytes(int64_t centers, int64_t dim) {
  return centers * (dim + ak::kWarps) * int64_t(sizeof(float));
}

AK_EXPORT int ak_cuda_center_lse_forward(int device, void *stream, const void *rows, int dtype, int64_t count,
                                         int64_t dim, const float *centers, int64_t center_count,
                                         const uint8_t *mask, float scale, const float *scale_tensor, float *lse,
                                         float *probabilities) {
  using namespace ak;
  const CenterProblem problem{count, dim, center_count, centers, mask, scale, scale_tensor};
  if (bad_shape(problem)) return AK_CUDA_BAD_SHAPE;
  if (count == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const size_t bytes = size_t(ak_cuda_center_lse_bytes(center_count, dim));
  return with_dtype(dtype, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    center_forward<T><<<blocks_of(count), kWarp * kWarps, bytes, static_cast<cudaStream_t>(stream)>>>(
        problem, static_cast<const T *>(rows), lse, probabilities);
    return cudaGetLastError();
  });
}

AK_EXPORT int ak_cuda_center_lse_backward(int device, void *stream, int64_t count, int64_t dim,
                                          const float *centers, int64_t center_count, const uint8_t *mask,
                                          float scale, const float *scale_tensor, const float *grad_lse,
                                          const float *probabilities, void *gradient, int gradient_dtype) {
  using namespace ak;
  const CenterProblem problem{count, dim, center_count, centers, mask, scale, scale_tensor};
  if (bad_shape(problem)) return AK_CUDA_BAD_SHAPE;
  if (count == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const size_t bytes = size_t(ak_cuda_center_lse_bytes(center_count, dim));
  return with_dtype(gradient_dtype, [&](auto out) -> int {
    using Out = typename decltype(out)::type;
    center_backward<Out><<<blocks_of(count), kWarp * kWarps, bytes, static_cast<cudaStream_t>(stream)>>>(
        problem, grad_lse, probabilities, static_cast<Out *>(gradient));
    return cudaGetLastError();
  });
}

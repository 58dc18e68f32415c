// pairwise_lse: which kernels serve a device, how work is split, and what is left around the products.
#include "pairwise_lse.cuh"

namespace ak {

// A build for other architectures leaves these kernels out.
#ifndef AK_SM90A
int forward_sm90a(const ForwardProblem &, Forward, int, int, int, cudaStream_t) { return AK_CUDA_NO_KERNEL; }
int backward_sm90a(const BackwardProblem &, Backward, int, int, int, cudaStream_t) { return AK_CUDA_NO_KERNEL; }
#endif
#ifndef AK_SM80
int forward_sm80(const ForwardProblem &, Forward, int, int, int, cudaStream_t) { return AK_CUDA_NO_KERNEL; }
int backward_sm80(const BackwardProblem &, Backward, int, int, int, cudaStream_t) { return AK_CUDA_NO_KERNEL; }
#endif

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostRows = INT_MAX - 1024;  // so that a tile's end is an int

#ifdef AK_SM90A
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

struct Gpu {
  int major = 0, minor = 0, processors = 1;

  explicit Gpu(int device) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  /// wgmma is an instruction of 9.0 alone.
  bool sm90a() const { return kHasSm90a && major == 9 && minor == 0; }

  cudaError_t error;
};

Rows rows_of(const ak_cuda_rows &rows) {
  return {rows.values, rows.taking_part, rows.index, int(rows.rows)};
}

bool bad_rows(const ak_cuda_rows &rows) { return rows.rows < 1 || rows.rows > kMostRows; }

/// lse of packed rows from their sums, in the rows' own order; 0 for rows that take no part.
__global__ void lse_of_sums(const Rows rows, const float *sums, float *lse) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p < rows.rows) lse[rows.origin(int(p))] = p < rows.count() ? logf(sums[p]) : 0.0f;
}

/// The terms of packed rows, and of none up to `padded`.
__global__ void lse_terms(const Rows rows, const float *lse, const float *grad, const float *peak, bool fixed,
                          int64_t padded, float *weights, float *shifts) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= padded) return;
  const bool takes_part = p < rows.count();
  const int64_t row = takes_part ? rows.origin(int(p)) : 0;
  const float row_lse = takes_part ? lse[row] : -INFINITY;
  const bool has_term = row_lse > -INFINITY;
  float weight = has_term ? grad[row] : 0.0f;
  if (peak != nullptr) weight /= unit_of_half(peak);
  if (fixed && has_term) weight *= expf(-row_lse);
  weights[p] = weight;
  if (!fixed) shifts[p] = has_term ? row_lse * kLog2E : INFINITY;
}

unsigned blocks_of(int64_t count) { return unsigned((count + kThreads - 1) / kThreads); }

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/// Into how many parts to cut the loops of `blocks` blocks so that they fill whole waves: the fewest that
/// keep 85 % of the processors at work, averaged over the waves, else the best.
int64_t splits_for(int64_t blocks, int64_t steps, int64_t processors, int64_t most) {
  const int64_t limit = max(int64_t(1), min(min(most, steps), parts(4 * processors, blocks)));
  int64_t best = 1;
  double fullest = 0.0;
  for (int64_t splits = 1; splits <= limit; ++splits) {
    const int64_t waves = parts(blocks * splits, processors);
    const double fullness = double(blocks * splits) / double(waves * processors);
    if (fullness > fullest) fullest = fullness, best = splits;
    if (fullness >= 0.85) break;
  }
  return best;
}

}  // namespace
}  // namespace ak

AK_EXPORT int64_t ak_cuda_pairwise_lse_splits(int device, int64_t rows, int64_t other_rows, int64_t dim,
                                              int backward, int form, int64_t most) {
  using namespace ak;
  if (rows < 1 || other_rows < 1 || dim < 1) return AK_CUDA_BAD_SHAPE;
  const Gpu gpu(device);
  if (gpu.error != cudaSuccess) return 1;  // the launch will tell
  const int64_t block = gpu.sm90a() ? (backward ? 128 : 256) : dim <= 128 ? 128 : 64;
  const int64_t keys = gpu.sm90a() && dim <= 128 ? 128 : 64;
  const bool half = !backward && form == AK_CUDA_SYMMETRIC;
  return splits_for(parts(rows, block), parts(half ? parts(other_rows, 2) : other_rows, keys), gpu.processors, most);
}

AK_EXPORT int ak_cuda_pairwise_lse_forward(int device, void *stream, const ak_cuda_rows *anchors,
                                           const ak_cuda_rows *keys, int dtype, int64_t dim, float scale,
                                           const float *scale_tensor, int form, int splits, float *sums,
                                           float *lse) {
  using namespace ak;
  const bool self = keys == nullptr, symmetric = form == AK_CUDA_SYMMETRIC;
  if (bad_rows(*anchors) || (!self && bad_rows(*keys)) || splits < 1) return AK_CUDA_BAD_SHAPE;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const Gpu gpu(device);
  if (gpu.error != cudaSuccess) return gpu.error;
  const auto queue = static_cast<cudaStream_t>(stream);
  const ForwardProblem problem{rows_of(*anchors), rows_of(self ? *anchors : *keys), self, {scale, scale_tensor},
                               symmetric ? sums : lse};
  const Forward forward = symmetric ? Forward::kSymmetric : form == AK_CUDA_FIXED ? Forward::kFixed : Forward::kOnline;
  const int code = (gpu.sm90a() ? forward_sm90a : forward_sm80)(problem, forward, dtype, int(dim), splits, queue);
  if (code != 0 || !symmetric) return code;
  lse_of_sums<<<blocks_of(anchors->rows), kThreads, 0, queue>>>(problem.anchors, sums, lse);
  return cudaGetLastError();
}

AK_EXPORT int ak_cuda_pairwise_lse_terms(int device, void *stream, const ak_cuda_rows *anchors, const float *lse,
                                         const float *grad_lse, const float *peak, int form, int64_t padded,
                                         float *weights, float *shifts) {
  using namespace ak;
  if (bad_rows(*anchors) || padded < anchors->rows) return AK_CUDA_BAD_SHAPE;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  lse_terms<<<blocks_of(padded), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rows_of(*anchors), lse, grad_lse, peak, form == AK_CUDA_FIXED, padded, weights, shifts);
  return cudaGetLastError();
}

AK_EXPORT int ak_cuda_pairwise_lse_backward(int device, void *stream, const ak_cuda_rows *own,
                                            const ak_cuda_rows *other, int dtype, int64_t dim, float scale,
                                            const float *scale_tensor, int form, const float *own_weights,
                                            const float *own_shifts, const float *other_weights,
                                            const float *other_shifts, const float *peak, int splits,
                                            int64_t columns, void *gradient, float *partial) {
  using namespace ak;
  const bool self = other == nullptr;
  if (bad_rows(*own) || (!self && bad_rows(*other)) || splits < 1 || columns < 1 || columns > dim)
    return AK_CUDA_BAD_SHAPE;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const Gpu gpu(device);
  if (gpu.error != cudaSuccess) return gpu.error;
  const BackwardProblem problem{rows_of(*own),
                                rows_of(self ? *own : *other),
                                self,
                                {scale, scale_tensor},
                                {own_weights, own_shifts},
                                {other_weights, other_shifts},
                                peak,
                                gradient,
                                partial,
                                int(columns)};
  const Backward backward = form == AK_CUDA_FIXED ? Backward::kFixed : self ? Backward::kBoth : Backward::kOne;
  return (gpu.sm90a() ? backward_sm90a : backward_sm80)(problem, backward, dtype, int(dim), splits,
                                                       static_cast<cudaStream_t>(stream));
}

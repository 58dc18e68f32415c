// sample_pixels: uniform draws among the candidates of every class; count -> scan -> rank, nothing for the
// host to wait for. Counts are integers, so their order of addition does not matter.
#include <cstdint>

#include "device.cuh"

namespace ak {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlock = AK_CUDA_SAMPLING_BLOCK;  // pixels counted together, and scanned for one draw
constexpr int kNoClass = -1;

__device__ double to_sum(double x) { return x; }
template <typename T>
__device__ float to_sum(T x) {
  return to_float(x);
}
__device__ double exponential(double x) { return exp(x); }
__device__ float exponential(float x) { return expf(x); }
__device__ double larger(double a, double b) { return fmax(a, b); }
__device__ float larger(float a, float b) { return fmaxf(a, b); }

__device__ int64_t load_label(const void *labels, int dtype, int64_t i) {
  switch (dtype) {
    case AK_CUDA_INT64:
      return static_cast<const int64_t *>(labels)[i];
    case AK_CUDA_INT32:
      return static_cast<const int32_t *>(labels)[i];
    case AK_CUDA_INT16:
      return static_cast<const int16_t *>(labels)[i];
    case AK_CUDA_INT8:
      return static_cast<const int8_t *>(labels)[i];
    default:
      return static_cast<const uint8_t *>(labels)[i];
  }
}

/// Whether the probability of the pixel's own class is below the threshold. NaN never is.
template <typename T>
__device__ bool is_hard(const ak_cuda_draw &draw, int64_t i, int64_t label) {
  const int64_t image = i / draw.pixels;
  const T *pixel = static_cast<const T *>(draw.scores) + image * draw.image_stride +
                   (i - image * draw.pixels) * draw.pixel_stride;
  auto own = to_sum(pixel[label * draw.class_stride]);
  if (draw.from_logits) {
    auto largest = own;
    for (int64_t c = 0; c < draw.classes; ++c) largest = larger(largest, to_sum(pixel[c * draw.class_stride]));
    decltype(own) sum = 0;
    for (int64_t c = 0; c < draw.classes; ++c) sum += exponential(to_sum(pixel[c * draw.class_stride]) - largest);
    own = exponential(own - largest) / sum;
  }
  return own < static_cast<decltype(own)>(draw.threshold);
}

template <typename T>
__device__ int candidate_class(const ak_cuda_draw &draw, int64_t i, int64_t total) {
  if (i >= total) return kNoClass;
  const int64_t label = load_label(draw.labels, draw.labels_dtype, i);
  if (label < 0 || label >= draw.classes || (draw.mask != nullptr && !draw.mask[i])) return kNoClass;
  if (draw.scores != nullptr && !is_hard<T>(draw, i, label)) return kNoClass;
  return int(label);
}

/// Adds the warp's candidates to counts (classes, blocks): once for each class that it meets.
__device__ void count_warp(int candidate, int *counts, int64_t blocks, int64_t block) {
  uint32_t pending = __ballot_sync(~0u, candidate != kNoClass);
  while (pending) {
    const int leader = __ffs(int(pending)) - 1;
    const int class_ = __shfl_sync(~0u, candidate, leader);
    const uint32_t same = __ballot_sync(~0u, candidate == class_);
    if (int(threadIdx.x) % kWarp == leader) atomicAdd(counts + class_ * blocks + block, __popc(same));
    pending &= ~same;
  }
}

template <typename T>
__global__ void count_candidates(const ak_cuda_draw draw, int64_t total, int64_t blocks, int *classes, int *counts) {
  const int64_t block = blockIdx.x;
  for (int offset = threadIdx.x; offset < kBlock; offset += kThreads) {
    const int64_t i = block * kBlock + offset;
    const int candidate = candidate_class<T>(draw, i, total);
    if (i < total) classes[i] = candidate;
    count_warp(candidate, counts, blocks, block);
  }
}

/// Sum over this lane and those before it.
__device__ int running_sum(int x) {
  const int lane = threadIdx.x % kWarp;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = __shfl_up_sync(~0u, x, lanes);
    if (lane >= lanes) x += before;
  }
  return x;
}

/// A warp a class: counts become the number of candidates before each block.
__global__ void scan_blocks(int64_t blocks, int *counts, int64_t *totals) {
  int *row = counts + int64_t(blockIdx.x) * blocks;
  int before = 0;
  for (int64_t first = 0; first < blocks; first += kWarp) {
    const int64_t block = first + threadIdx.x;
    const int count = block < blocks ? row[block] : 0, sum = running_sum(count);
    if (block < blocks) row[block] = before + sum - count;
    before += __shfl_sync(~0u, sum, kWarp - 1);
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

/// First word of Philox 4x32-10 (Salmon et al., 2011) for a 64-bit key and the counter (counter, 0, 0, 0).
__device__ uint32_t philox(uint64_t key, uint32_t counter) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, key_0 = uint32_t(key), key_1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_0 = __umulhi(0xD2511F53u, c0), low_0 = 0xD2511F53u * c0;
    const uint32_t high_1 = __umulhi(0xCD9E8D57u, c2), low_1 = 0xCD9E8D57u * c2;
    c0 = high_1 ^ c1 ^ key_0, c1 = low_1, c2 = high_0 ^ c3 ^ key_1, c3 = low_0;
    key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u;
  }
  return c0;
}

/// The last block with at most `rank` candidates before it: the one that holds the rank.
__device__ int64_t block_of_rank(const int *before, int64_t blocks, int rank) {
  int64_t low = 0, high = blocks;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (before[middle] <= rank ? low : high) = middle;
  }
  return low;
}

/// A warp a draw.
__global__ void draw_pixels(const ak_cuda_draw draw, int64_t total, int64_t blocks, const int *classes,
                            const int *before, const int64_t *totals, int64_t *index) {
  const int64_t number = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (number >= draw.classes * draw.samples) return;
  const int lane = threadIdx.x % kWarp, class_ = int(number / draw.samples);
  const uint64_t count = uint64_t(totals[class_]);
  const int *row = before + class_ * blocks;
  int64_t found = -1;
  if (count > 0) {
    int rank = int(philox(uint64_t(*draw.seed), uint32_t(number)) * count >> 32);
    const int64_t block = block_of_rank(row, blocks, rank);
    rank -= row[block];
    for (int64_t i = block * kBlock; found < 0; i += kWarp) {
      const bool candidate = i + lane < total && classes[i + lane] == class_;
      const uint32_t votes = __ballot_sync(~0u, candidate);
      const bool hit = candidate && __popc(votes & ((1u << lane) - 1)) == rank;
      const uint32_t winner = __ballot_sync(~0u, hit);
      if (winner) found = i + __ffs(int(winner)) - 1;
      rank -= __popc(votes);
    }
  }
  if (lane == 0) index[number] = found;
}

template <typename Function>
int with_scores(const ak_cuda_draw &draw, Function function) {
  if (draw.scores == nullptr) return function(Type<float>{});
  if (draw.scores_dtype == AK_CUDA_FLOAT64) return function(Type<double>{});
  return with_dtype(draw.scores_dtype, function);
}

}  // namespace
}  // namespace ak

AK_EXPORT int ak_cuda_sample_pixels(int device, void *stream, const ak_cuda_draw *draw, int32_t *classes,
                                    int32_t *counts, int64_t *totals, int64_t *index) {
  using namespace ak;
  const int64_t total = draw->batch * draw->pixels, draws = draw->classes * draw->samples;
  if (draw->batch < 0 || draw->pixels < 0 || total > INT32_MAX || draw->classes < 1 || draw->classes > INT32_MAX ||
      draw->samples < 0 || draws > int64_t(1) << 32)
    return AK_CUDA_BAD_SHAPE;
  if (draw->labels_dtype < AK_CUDA_INT64 || draw->labels_dtype > AK_CUDA_UINT8) return AK_CUDA_BAD_DTYPE;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = (total + kBlock - 1) / kBlock;
  const ak_cuda_draw asked = *draw;
  if (blocks > 0) {
    const int code = with_scores(asked, [&](auto scores) -> int {
      using T = typename decltype(scores)::type;
      count_candidates<T><<<unsigned(blocks), kThreads, 0, queue>>>(asked, total, blocks, classes, counts);
      return cudaGetLastError();
    });
    if (code != 0) return code;
  }
  scan_blocks<<<unsigned(asked.classes), kWarp, 0, queue>>>(blocks, counts, totals);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || draws == 0) return error;
  draw_pixels<<<unsigned((draws + kWarps - 1) / kWarps), kThreads, 0, queue>>>(asked, total, blocks, classes, counts,
                                                                              totals, index);
  return cudaGetLastError();
}

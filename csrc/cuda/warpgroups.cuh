// What the wgmma kernels share: a producer warpgroup that fills a ring of tiles, two that multiply.
#pragma once

#include "pairwise_lse.cuh"
#include "ptx_sm90.cuh"

namespace ak {

constexpr int kGroup = 128;       // threads of a warpgroup
constexpr int kGroupRows = 64;    // of a product
constexpr int kConsumers = 2;     // warpgroups
constexpr int kColumn = 64;       // 16-bit numbers in 128 bytes, the width of a swizzle
constexpr int kThreads = (kConsumers + 1) * kGroup;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kRowGroups = 1024;  // bytes from 8 rows of 128 bytes to the next 8

/// The warpgroup of this thread, in a way that tells the compiler that a warp has one.
__device__ inline int warpgroup() { return __shfl_sync(~0u, int(threadIdx.x) / kGroup, 0); }

/// Tile t lies in stage t % kStages; its buffer is used for the (t / kStages)-th time.
template <int kStages>
struct Stage {
  int number, parity;
  __device__ explicit Stage(int t) : number(t % kStages), parity(t / kStages & 1) {}
};

template <int kStages>
struct Ring {
  uint64_t own_full, full[kStages], empty[kStages];

  __device__ void init() {
    if (threadIdx.x == 0) {
      ptx::barrier_init(&own_full, 1);
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(&full[s], 1);
        ptx::barrier_init(&empty[s], kConsumers * kGroup / kWarp);
      }
      ptx::barrier_init_fence();
    }
    __syncthreads();
  }
  __device__ void wait_until_full(int t) {
    const Stage<kStages> stage(t);
    ptx::barrier_wait(&full[stage.number], stage.parity);
  }
  __device__ void wait_until_empty(int t) {
    const Stage<kStages> stage(t);
    ptx::barrier_wait(&empty[stage.number], stage.parity ^ 1);
  }
  /// This warp has read tile t.
  __device__ void release(int t) {
    if (threadIdx.x % kWarp == 0) ptx::barrier_arrive(&empty[Stage<kStages>(t).number]);
  }
};

/// x (64 x keys) = own (64 x dim) keys^T, without waiting; both tiles in boxes of 64 columns.
template <typename T, int kDim, int kRegisters>
__device__ void start_product(float (&x)[kRegisters], const T (&own)[kDim / kColumn][kGroupRows * kColumn],
                              const T (&keys)[kDim / kColumn][2 * kRegisters * kColumn]) {
  const uint64_t left = ptx::descriptor(own, 16, kRowGroups), right = ptx::descriptor(keys, 16, kRowGroups);
  ptx::group_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int box = step * 16 / kColumn, k = step * 16 % kColumn * int(sizeof(T));
    ptx::group_multiply_add<T>(x, ptx::advance(left, box * int(sizeof own[0]) + k),
                               ptx::advance(right, box * int(sizeof keys[0]) + k), step > 0);
  }
  ptx::group_commit();
}

/// Of rows (count, dim): boxes of `box_rows` rows by 64 columns.
template <typename T>
cudaError_t describe(CUtensorMap *map, const void *rows, int64_t count, int dim, int box_rows) {
  void *function = nullptr;  // by name: the library links against no driver
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorInvalidValue;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  const cuuint64_t extent[2] = {cuuint64_t(dim), cuuint64_t(count)}, stride[1] = {cuuint64_t(dim) * sizeof(T)};
  const cuuint32_t box[2] = {kColumn, cuuint32_t(box_rows)}, step[2] = {1, 1};
  constexpr auto kType =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const bool done = encode(map, kType, 2, const_cast<void *>(rows), extent, stride, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  return done ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace ak

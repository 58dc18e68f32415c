// What every CUDA source shares: conversions, dtype dispatch, the device guard.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "action_kernels_cuda.h"

#define AK_EXPORT extern "C" __attribute__((visibility("default")))

namespace ak {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
struct Type {
  using type = T;
};

/// Calls `function` with the Type of `dtype`; AK_CUDA_BAD_DTYPE if there is none.
template <typename Function>
int with_dtype(int dtype, Function function) {
  switch (dtype) {
    case AK_CUDA_FLOAT32:
      return function(Type<float>{});
    case AK_CUDA_FLOAT16:
      return function(Type<__half>{});
    case AK_CUDA_BFLOAT16:
      return function(Type<__nv_bfloat16>{});
    default:
      return AK_CUDA_BAD_DTYPE;
  }
}

/// Makes a device current for the lifetime of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && device != previous_) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace ak

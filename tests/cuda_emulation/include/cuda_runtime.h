// The part of the CUDA runtime that the kernels of this project use, on the CPU.
#pragma once

#include <cmath>

#include "cuda.h"
#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __CUDA_ARCH_LIST__ 800, 900

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };

namespace emulation {
inline std::string reported_error;
}

inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  if (emulation::last_error.empty()) return cudaSuccess;
  emulation::reported_error = std::move(emulation::last_error);
  emulation::last_error.clear();
  return cudaErrorLaunchFailure;
}
inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulation::reported_error.c_str() : "invalid value";
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  const int capability = emulation::options.capability;
  *value = attribute == cudaDevAttrMultiProcessorCount        ? 2
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return cudaSuccess;
}
/// Only for cuTensorMapEncodeTiled.
inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult *result) {
  *function = reinterpret_cast<void *>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { emulation::block->barrier(0, int(emulation::block->fibers.size())); }
inline void __syncwarp(uint32_t mask = ~0u) {
  emulation::block->meet(mask, "__syncwarp", nullptr, [](void **) { emulation::block->order_lanes(); });
}

namespace emulation {

/// Every lane gives a value and names the lane whose value it gets; one out of range: its own.
template <typename T>
T exchange(uint32_t mask, const char *name, T value, int from) {
  struct Slot {
    T value, got;
    int from;
  } slot{value, value, from};
  block->meet(mask, name, &slot, [&](void **slots) {
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      auto *s = static_cast<Slot *>(slots[i]);
      if (s->from < 0 || s->from >= kWarp) continue;
      if (!(mask >> s->from & 1)) fail("%s reads lane %d, outside of its mask", name, s->from);
      s->got = static_cast<Slot *>(slots[s->from])->value;
    }
  });
  return slot.got;
}

}  // namespace emulation

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulation::exchange(mask, "__shfl_xor_sync", value, emulation::fiber->lane ^ lanes);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulation::exchange(mask, "__shfl_sync", value, lane % emulation::kWarp);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes) {
  return emulation::exchange(mask, "__shfl_up_sync", value, emulation::fiber->lane - int(lanes));
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes) {
  return emulation::exchange(mask, "__shfl_down_sync", value, emulation::fiber->lane + int(lanes));
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  struct Slot {
    int predicate;
    uint32_t got;
  } slot{predicate, 0};
  emulation::block->meet(mask, "__ballot_sync", &slot, [&](void **slots) {
    uint32_t votes = 0;
    for (int i = 0; i < emulation::kWarp; ++i)
      if (mask >> i & 1) votes |= uint32_t(static_cast<Slot *>(slots[i])->predicate != 0) << i;
    for (int i = 0; i < emulation::kWarp; ++i)
      if (mask >> i & 1) static_cast<Slot *>(slots[i])->got = votes;
  });
  return slot.got;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

template <typename T>
T atomicAdd(T *p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
using std::max;
using std::min;

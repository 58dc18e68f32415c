// What the library says about itself.
#include "device.cuh"

#define AK_TEXT(...) #__VA_ARGS__
#define AK_EXPAND(...) AK_TEXT(__VA_ARGS__)

AK_EXPORT int ak_cuda_abi_version(void) { return AK_CUDA_ABI_VERSION; }

// nvcc names the architectures of a build in __CUDA_ARCH_LIST__: 800,900 for sm_80 and sm_90.
AK_EXPORT const char *ak_cuda_architectures(void) { return AK_EXPAND(__CUDA_ARCH_LIST__); }

AK_EXPORT const char *ak_cuda_device_type(void) {
#ifdef AK_EMULATED
  return "cpu";
#else
  return "cuda";
#endif
}

AK_EXPORT const char *ak_cuda_error_message(int code) {
  switch (code) {
    case AK_CUDA_BAD_DTYPE:
      return "a dtype is not one that its argument takes";
    case AK_CUDA_BAD_SHAPE:
      return "a shape has a length that is negative or too large";
    case AK_CUDA_NO_KERNEL:
      return "the library was built for other architectures than this device's; see "
             "ACTION_KERNELS_CUDA_ARCHS";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

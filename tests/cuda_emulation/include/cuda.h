// The part of the CUDA driver's interface that describes tensors for bulk copies.
#pragma once
#include <cstdint>

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  const char *base;
  cuuint64_t extent[2], stride;
  cuuint32_t box[2];
  CUtensorMapSwizzle swizzle;
};

/// Two dimensions of 16-bit numbers; the driver's own conditions are checked.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *base,
                                       const cuuint64_t *extent, const cuuint64_t *stride, const cuuint32_t *box,
                                       const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride[0] % 16 == 0;
  const cuuint32_t row_bytes = box[0] * 2;
  const bool fits = box[0] <= 256 && box[1] <= 256 && row_bytes % 16 == 0 &&
                    !(swizzle == CU_TENSOR_MAP_SWIZZLE_128B && row_bytes > 128);
  if (rank != 2 || !aligned || !fits || !extent[0] || !extent[1] || extent[1] >> 32) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char *>(base), {extent[0], extent[1]}, stride[0], {box[0], box[1]}, swizzle};
  return CUDA_SUCCESS;
}

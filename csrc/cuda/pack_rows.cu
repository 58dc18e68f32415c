// Rows as the products take them: of a width that there are kernels for, those that take part first.
#include <climits>

#include "device.cuh"

namespace ak {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 8;

/// Where row i goes: behind the rows before it that take part, or behind all of those that do.
__device__ int64_t position_of(int64_t i, int64_t rows, const uint8_t *mask, const int *taken) {
  if (mask == nullptr) return i;
  return mask[i] ? taken[i] - 1 : taken[rows - 1] + (i - taken[i]);
}

/// A warp a row. 16-bit numbers are copied as they are; zeros for rows that take no part and past `dim`.
__global__ void pack_rows(const uint16_t *source, int64_t rows, int64_t dim, int64_t row_stride,
                          int64_t column_stride, const uint8_t *mask, const int *taken, uint16_t *values,
                          int64_t width, int *index) {
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const bool takes_part = mask == nullptr || mask[row];
  const int64_t position = position_of(row, rows, mask, taken);
  for (int64_t c = threadIdx.x % kWarp; c < width; c += kWarp)
    values[position * width + c] = takes_part && c < dim ? source[row * row_stride + c * column_stride] : 0;
  if (index != nullptr && threadIdx.x % kWarp == 0) index[position] = int(row);
}

}  // namespace
}  // namespace ak

AK_EXPORT int ak_cuda_pack_rows(int device, void *stream, const void *source, int64_t rows, int64_t dim,
                                int64_t row_stride, int64_t column_stride, const uint8_t *mask,
                                const int32_t *taken, void *values, int64_t width, int32_t *index) {
  using namespace ak;
  if (rows < 0 || dim < 0 || width < dim || rows > INT_MAX) return AK_CUDA_BAD_SHAPE;
  if (rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const unsigned blocks = unsigned((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
  pack_rows<<<blocks, kWarp * kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint16_t *>(source), rows, dim, row_stride, column_stride, mask, taken,
      static_cast<uint16_t *>(values), width, index);
  return cudaGetLastError();
}

// What the mma.sync kernels share: tiles of rows in shared memory, fragments of them, a ring of tiles.
//
// A warp owns 16 * kFragments rows, whose fragments stay in registers; tiles of other rows pass through a
// ring of kStages buffers that all threads fill.
#pragma once

#include "pairwise_lse.cuh"

namespace ak {

template <typename T, int kDim_, int kFragments_, int kWarps_, int kKeys_, int kStages_, int kBlocks_>
struct Shape {
  using Element = T;
  static constexpr int kDim = kDim_, kFragments = kFragments_, kWarps = kWarps_, kKeys = kKeys_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;  // blocks a multiprocessor
  static constexpr int kThreads = kWarps * kWarp, kWarpRows = 16 * kFragments, kRows = kWarpRows * kWarps;
  static constexpr int kSteps = kDim / 16;
};

template <typename S>
using T_of = typename S::Element;

/// Rows of 16-bit numbers in shared memory; chunks of 16 bytes are permuted within a row by the row's
/// number, so that eight rows of one column of chunks lie in eight different bank groups.
template <typename T, int kDim>
struct Tile {
  T *memory;
  __device__ T *at(int row, int chunk) const { return memory + row * kDim + (chunk ^ (row & 7)) * 8; }
};

/// From the shared address of a chunk of the first 16 columns to that of 16-column step `step`: rows begin at
/// whole permutations.
__device__ inline uint32_t at_step(uint32_t chunk, int step) { return chunk ^ uint32_t(step * 32); }

template <typename S, int kRows>
__device__ void copy_rows(Tile<T_of<S>, S::kDim> tile, const Rows &rows, int first) {
  constexpr int kChunks = S::kDim / 8;
  const auto *values = static_cast<const T_of<S> *>(rows.values);
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kChunks; i += S::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool exists = first + row < rows.rows;
    ptx::copy_async(tile.at(row, chunk), values + int64_t(exists ? first + row : 0) * S::kDim + chunk * 8, exists);
  }
}

// Where a lane's row of a matrix lies for `load_matrices`, at step 0. Fragments of 16 rows by 16 columns:

/// the left operand, and transposed the right operand of weights keys (two fragments of 8 columns);
template <typename T, int kDim>
__device__ uint32_t left_chunk(Tile<T, kDim> tile, int row) {
  const int lane = threadIdx.x % kWarp;
  return ptx::shared_address(tile.at(row + lane % 16, lane / 16));
}

/// the right operand of rows keys^T (two fragments of 8 keys).
template <typename T, int kDim>
__device__ uint32_t right_chunk(Tile<T, kDim> tile, int row) {
  const int lane = threadIdx.x % kWarp;
  return ptx::shared_address(tile.at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

/// Fragments of a warp's own rows.
template <typename S>
using OwnFragments = uint32_t[S::kFragments][S::kSteps][4];

/// x = products of a warp's rows and 16 keys from `key` of the tile on.
template <typename S>
__device__ void multiply(float (&x)[S::kFragments][2][4], const OwnFragments<S> &a,
                         Tile<T_of<S>, S::kDim> tile, int key) {
#pragma unroll
  for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[f][0][i] = x[f][1][i] = 0.0f;
  const uint32_t chunk = right_chunk(tile, key);
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t b[4];
    ptx::load_matrices(b, at_step(chunk, step));
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      ptx::multiply_add<T_of<S>>(x[f][0], a[f][step], b[0], b[1]);
      ptx::multiply_add<T_of<S>>(x[f][1], a[f][step], b[2], b[3]);
    }
  }
}

/// The own rows and the ring of other tiles in shared memory.
template <typename S>
class Tiles {
 public:
  using T = T_of<S>;
  static constexpr int kBytes = (S::kRows + S::kStages * S::kKeys) * S::kDim * int(sizeof(T));

  __device__ explicit Tiles(unsigned char *memory) : memory_(reinterpret_cast<T *>(memory)) {}

  /// Asks for the own rows and the first tiles.
  __device__ void begin(const Rows &own, const Rows &other, int first, const Order &order, Share share) {
    copy_rows<S, S::kRows>({memory_}, own, first);
#pragma unroll
    for (int s = 0; s < S::kStages - 1; ++s) ask(other, share.first + s, order, share);
  }

  /// Tile t, arrived in full; what was read of tile t - 1 may be overwritten from here on, and is.
  __device__ Tile<T, S::kDim> next(const Rows &other, int t, const Order &order, Share share) {
    ptx::wait_copies<S::kStages - 2>();
    __syncthreads();
    ask(other, t + S::kStages - 1, order, share);
    return buffer(t - share.first);
  }

  __device__ void load_own(OwnFragments<S> &a) const {
    const int row = threadIdx.x / kWarp * S::kWarpRows;
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const uint32_t chunk = left_chunk(Tile<T, S::kDim>{memory_}, row + 16 * f);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) ptx::load_matrices(a[f][step], at_step(chunk, step));
    }
  }

 private:
  __device__ Tile<T, S::kDim> buffer(int use) const {
    return {memory_ + (S::kRows + use % S::kStages * S::kKeys) * S::kDim};
  }

  __device__ void ask(const Rows &other, int t, const Order &order, Share share) {
    if (t < share.last) copy_rows<S, S::kKeys>(buffer(t - share.first), other, order.start(t));
    ptx::commit_copies();
  }

  T *memory_;
};

}  // namespace ak

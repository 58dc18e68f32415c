// pairwise_lse forward by mma.sync: lse_i = log sum_j e^(scale a_i . k_j).
//
// Each lane keeps the maximum and the sum of the columns it holds; lanes meet once, at the end. Symmetric:
// each pair of blocks once, column sums by halving over lanes, then over warps in shared memory.
#include "fragments.cuh"

namespace ak {
namespace {

/// Sum over the rows of a warp of what its lanes hold for 16 columns: lane 4 g + t of those with an even g
/// gets that of column 8 (g / 4) + 2 t + g / 2 % 2. Each of the first two steps halves the columns.
__device__ float sum_over_rows(const float (&column)[4]) {
  const int g = threadIdx.x % kWarp / 4;
  const bool upper = g & 4, odd = g & 2;
  float v[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    v[i] = (upper ? column[2 + i] : column[i]) + __shfl_xor_sync(~0u, upper ? column[i] : column[2 + i], 16);
  const float sum = (odd ? v[1] : v[0]) + __shfl_xor_sync(~0u, odd ? v[0] : v[1], 8);
  return sum + __shfl_xor_sync(~0u, sum, 4);
}

template <typename S, Forward kForward>
class Sums {
 public:
  static constexpr bool kSymmetric = kForward == Forward::kSymmetric, kOnline = kForward == Forward::kOnline;

  __device__ Sums(const ForwardProblem &p, float multiplier, int first, float *columns)
      : multiplier(multiplier),
        lane(threadIdx.x % kWarp),
        row(first + threadIdx.x / kWarp * S::kWarpRows + lane / 4),
        count(p.anchors.count()),
        key_count(p.keys.count()),
        self(p.self),
        columns(columns) {
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[f][r] = 0.0f;
        maximum[f][r] = kOnline ? -INFINITY : 0.0f;
      }
  }

  /// Adds tile t, whose first key is `key`; `of_columns`: its columns are summed as well.
  template <bool kMasked>
  __device__ void add(const OwnFragments<S> &a, Tile<T_of<S>, S::kDim> tile, int key, int t, bool of_columns) {
#pragma unroll 2
    for (int column = 0; column < S::kKeys; column += 16) add_keys<kMasked>(a, tile, key, column, t, of_columns);
  }

  /// Sums of tile t, complete after a barrier, of column c.
  __device__ float column_sum(int t, int c) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) sum += ptx::load_shared(columns + (t % 2 * S::kWarps + w) * S::kKeys + c);
    return sum;
  }

  /// `result(row, maximum, sum)` for each row of the warp, by one of the four lanes that share it.
  template <typename Result>
  __device__ void finish(Result result) {
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowSum<kOnline> sum{maximum[f][r], total[f][r]};
        sum.meet(multiplier);
        if (lane % 4 == 0) result(row + 16 * f + 8 * r, sum.maximum, sum.total);
      }
  }

 private:
  /// Adds the 16 keys from `column` of the tile on.
  template <bool kMasked>
  __device__ void add_keys(const OwnFragments<S> &a, Tile<T_of<S>, S::kDim> tile, int key, int column, int t,
                           bool of_columns) {
    float x[S::kFragments][2][4], of_column[4] = {};
    multiply<S>(x, a, tile, column);
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const Mask mask(self, row + 16 * f, key + column + 2 * (lane % 4), key_count, kSymmetric ? count : INT_MAX);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = x[f][i / 2][2 * r + i % 2];
          if (kMasked && mask.leaves_out(i / 2 * 8 + i % 2, 8 * r)) v[i] = -INFINITY;
        }
        if (kOnline) raise_maximum(v, f, r);
        const float shift = kOnline && maximum[f][r] > -INFINITY ? maximum[f][r] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = ptx::exp2((v[i] - shift) * multiplier);
          if (kSymmetric) of_column[i] += v[i];
        }
        total[f][r] += (v[0] + v[1]) + (v[2] + v[3]);
      }
    }
    if (kSymmetric && of_columns) write_columns(of_column, column, t);
  }

  __device__ void raise_maximum(const float (&v)[4], int f, int r) {
    const float largest = fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])), maximum[f][r]);
    if (largest > maximum[f][r]) {
      total[f][r] *= ptx::exp2((maximum[f][r] - largest) * multiplier);
      maximum[f][r] = largest;
    }
  }

  __device__ void write_columns(const float (&of_column)[4], int column, int t) {
    const float sum = sum_over_rows(of_column);
    const int g = lane / 4, mine = g / 4 * 8 + 2 * (lane % 4) + g / 2 % 2, warp = threadIdx.x / kWarp;
    if (g % 2 == 0) ptx::store_shared(columns + (t % 2 * S::kWarps + warp) * S::kKeys + column + mine, sum);
  }

  const float multiplier;
  const int lane, row, count, key_count;
  const bool self;
  float *const columns;  // [2][kWarps][kKeys]: of a tile and of the one before
  float total[S::kFragments][2], maximum[S::kFragments][2];
};

template <typename S, Forward kForward>
constexpr int shared_bytes() {
  return Tiles<S>::kBytes + (kForward == Forward::kSymmetric ? 2 * S::kWarps * S::kKeys * int(sizeof(float)) : 0);
}

template <typename S, Forward kForward>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) lse_forward_sm80(const ForwardProblem p) {
  constexpr bool kSymmetric = kForward == Forward::kSymmetric;
  extern __shared__ __align__(1024) unsigned char shared[];
  Tiles<S> tiles(shared);
  const int first = int(blockIdx.x) * S::kRows, count = p.anchors.count(), key_count = p.keys.count();
  const Order order = first >= count ? Order()
                      : kSymmetric   ? Order::of_circle(S::kKeys, count, int(blockIdx.x), S::kRows)
                                     : Order::of_keys(S::kKeys, key_count, p.self, first, S::kRows);
  const Share share(order);
  const float scale = p.scale.get();
  Sums<S, kForward> sums(p, scale * kLog2E, first, reinterpret_cast<float *>(shared + Tiles<S>::kBytes));
  auto add_columns = [&](int t) {
    if constexpr (kSymmetric) {
      for (int c = threadIdx.x; c < S::kKeys && !order.is_own(t); c += S::kThreads) {
        const float sum = sums.column_sum(t, c);
        if (order.start(t) + c < count) atomicAdd(p.result + order.start(t) + c, sum);
      }
    }
  };
  tiles.begin(p.anchors, p.keys, first, order, share);
  OwnFragments<S> a;
  auto step = [&](int t, auto masked) {
    const auto tile = tiles.next(p.keys, t, order, share);
    if (t == share.first)
      tiles.load_own(a);
    else
      add_columns(t - 1);
    sums.template add<masked.value>(a, tile, order.start(t), t, !order.is_own(t));
  };
  int t = share.first;
  for (; t < share.masked; ++t) step(t, std::true_type{});
  for (; t < share.last; ++t) step(t, std::false_type{});
  if (share.first < share.last) {
    __syncthreads();
    add_columns(share.last - 1);
  }
  sums.finish([&](int row, float maximum, float sum) {
    if (row >= p.anchors.rows) return;
    if (!kSymmetric)
      p.result[int64_t(blockIdx.y) * p.anchors.rows + p.anchors.origin(row)] =
          row < count ? maximum * scale + logf(sum) : 0.0f;
    else if (row < count)
      atomicAdd(p.result + row, sum);
  });
}

template <typename S, Forward kForward>
int launch(const ForwardProblem &p, int splits, cudaStream_t stream) {
  constexpr int kBytes = shared_bytes<S, kForward>();
  const cudaError_t error = allow_shared_memory(lse_forward_sm80<S, kForward>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((p.anchors.rows + S::kRows - 1) / S::kRows, splits);
  lse_forward_sm80<S, kForward><<<grid, S::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int forward_sm80(const ForwardProblem &p, Forward forward, int dtype, int dim, int splits, cudaStream_t stream) {
  return with_rows(dtype, dim, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kDim = columns.value;
    // of 256 columns the fragments of 16 rows fill half of the registers
    using S = Shape<T, kDim, kDim <= 128 ? 2 : 1, 4, 64, 2, kDim <= 128 ? 2 : 1>;
    switch (forward) {
      case Forward::kFixed:
        return launch<S, Forward::kFixed>(p, splits, stream);
      case Forward::kOnline:
        return launch<S, Forward::kOnline>(p, splits, stream);
      default:
        return launch<S, Forward::kSymmetric>(p, splits, stream);
    }
  });
}

}  // namespace ak

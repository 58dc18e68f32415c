// pairwise_lse backward by mma.sync: gradient_i = scale sum_j G_ij f_j, a block's rows at a time, without
// atomics. A product's accumulators are the left operand of the next product as they stand.
#include "fragments.cuh"

namespace ak {
namespace {

template <typename S, Backward kBackward>
class Gradient {
 public:
  __device__ Gradient(const BackwardProblem &p, float multiplier, int first)
      : terms(p.other_terms),
        multiplier(multiplier),
        lane(threadIdx.x % kWarp),
        row(first + threadIdx.x / kWarp * S::kWarpRows + lane / 4),
        key_count(p.other.count()),
        self(p.self) {
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        weight[f][r] = p.own_terms.weights[row + 16 * f + 8 * r];
        shift[f][r] = kFixed ? 0.0f : p.own_terms.shifts[row + 16 * f + 8 * r];
      }
#pragma unroll
      for (int n = 0; n < S::kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[f][n][i] = 0.0f;
    }
  }

  /// Adds the tile whose first key is `key`.
  template <bool kMasked>
  __device__ void add(const OwnFragments<S> &a, Tile<T_of<S>, S::kDim> tile, int key) {
#pragma unroll 1
    for (int column = 0; column < S::kKeys; column += 16) {
      float x[S::kFragments][2][4];
      multiply<S>(x, a, tile, column);
      uint32_t g[S::kFragments][4];
      weigh<kMasked>(g, x, key + column + 2 * (lane % 4));
      const uint32_t chunk = left_chunk(tile, column);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, at_step(chunk, step));
#pragma unroll
        for (int f = 0; f < S::kFragments; ++f) {
          ptx::multiply_add<T_of<S>>(total[f][2 * step], g[f], b[0], b[1]);
          ptx::multiply_add<T_of<S>>(total[f][2 * step + 1], g[f], b[2], b[3]);
        }
      }
    }
  }

  /// `store(row, column, low, high)` for each pair of columns of this thread's rows.
  template <typename Store>
  __device__ void finish(Store store) {
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int n = 0; n < S::kDim / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          store(row + 16 * f + 8 * r, n * 8 + 2 * (lane % 4), total[f][n][2 * r], total[f][n][2 * r + 1]);
  }

 private:
  static constexpr bool kFixed = kBackward == Backward::kFixed;

  /// G of 16 keys; this lane's are key, key + 1, key + 8, key + 9.
  template <bool kMasked>
  __device__ void weigh(uint32_t (&g)[S::kFragments][4], const float (&x)[S::kFragments][2][4], int key) const {
    float other[4], other_shift[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int of_lane = key + i / 2 * 8 + i % 2;
      other[i] = terms.weights[of_lane];
      other_shift[i] = kFixed ? 0.0f : terms.shifts[of_lane];
    }
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const Mask mask(self, row + 16 * f, key, key_count);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float v[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = weight_of(x[f][n][2 * r + i] * multiplier, weight[f][r], shift[f][r], other[2 * n + i],
                             other_shift[2 * n + i], std::integral_constant<Backward, kBackward>{});
            if (kMasked && mask.leaves_out(8 * n + i, 8 * r)) v[i] = 0.0f;
          }
          g[f][2 * n + r] = ptx::pack<T_of<S>>(v[0], v[1]);
        }
    }
  }

  const Terms terms;
  const float multiplier;
  const int lane, row, key_count;
  const bool self;
  float weight[S::kFragments][2], shift[S::kFragments][2];
  float total[S::kFragments][S::kDim / 8][4];
};

template <typename S, Backward kBackward>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) lse_backward_sm80(const BackwardProblem p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Tiles<S> tiles(shared);
  const int first = int(blockIdx.x) * S::kRows, count = p.own.count();
  const Order order = first < count ? Order::of_keys(S::kKeys, p.other.count(), p.self, first, S::kRows) : Order();
  const Share share(order);
  const float scale = p.scale.get(), factor = scale * (p.peak ? unit_of_half(p.peak) : 1.0f);
  Gradient<S, kBackward> gradient(p, scale * kLog2E, first);
  tiles.begin(p.own, p.other, first, order, share);
  OwnFragments<S> a;
  auto step = [&](int t, auto masked) {
    const auto tile = tiles.next(p.other, t, order, share);
    if (t == share.first) tiles.load_own(a);
    gradient.template add<masked.value>(a, tile, order.start(t));
  };
  int t = share.first;
  for (; t < share.masked; ++t) step(t, std::true_type{});
  for (; t < share.last; ++t) step(t, std::false_type{});
  gradient.finish([&](int row, int column, float low, float high) {
    if (row >= p.own.rows) return;
    const bool takes_part = row < count;
    store_gradient<T_of<S>>(p, p.own.origin(row), column, takes_part ? low * factor : 0.0f,
                            takes_part ? high * factor : 0.0f);
  });
}

template <typename S, Backward kBackward>
int launch(const BackwardProblem &p, int splits, cudaStream_t stream) {
  constexpr int kBytes = Tiles<S>::kBytes;
  const cudaError_t error = allow_shared_memory(lse_backward_sm80<S, kBackward>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((p.own.rows + S::kRows - 1) / S::kRows, splits);
  lse_backward_sm80<S, kBackward><<<grid, S::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int backward_sm80(const BackwardProblem &p, Backward backward, int dtype, int dim, int splits, cudaStream_t stream) {
  return with_rows(dtype, dim, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kDim = columns.value;
    using S = Shape<T, kDim, kDim <= 128 ? 2 : 1, 4, 64, 2, 1>;
    switch (backward) {
      case Backward::kFixed:
        return launch<S, Backward::kFixed>(p, splits, stream);
      case Backward::kOne:
        return launch<S, Backward::kOne>(p, splits, stream);
      default:
        return launch<S, Backward::kBoth>(p, splits, stream);
    }
  });
}

}  // namespace ak

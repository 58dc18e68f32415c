// pairwise_lse forward by wgmma: lse_i = log sum_j e^(scale a_i . k_j).
//
// A block has 256 anchors, a warpgroup two times 64: while the tensor cores work on one half of a tile, the
// exponentials of the other half are taken. Symmetric: each pair of blocks once; the columns of a tile are
// summed in registers over 128 rows a warpgroup, over lanes by halving, over warps in shared memory.
#include "warpgroups.cuh"

namespace ak {
namespace {

constexpr int kHalves = 2;
constexpr int kRowTiles = kConsumers * kHalves;
constexpr int kRows = kRowTiles * kGroupRows;
constexpr int kConsumerWarps = kConsumers * kGroup / kWarp;
constexpr int kColumnsBarrier = 1;

template <typename T, int kDim_>
struct Memory {
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = kDim <= 128 ? 128 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : kDim == 128 ? 3 : 2;
  using Element = T;

  T own[kRowTiles][kDim / kColumn][kGroupRows * kColumn];
  T keys[kStages][kDim / kColumn][kKeys * kColumn];
  float columns[2][kConsumerWarps][kKeys];  // sums over a warp's rows, of a tile and of the one before
  Ring<kStages> ring;
};

/// Lanes kLanes apart share out 2 kCount columns: each keeps half, summed over both.
template <int kLanes, int kCount, int kSize>
__device__ void halve(float (&column)[kSize]) {
  const bool upper = threadIdx.x & kLanes;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const float kept = upper ? column[kCount + c] : column[c], sent = upper ? column[c] : column[kCount + c];
    column[c] = kept + __shfl_xor_sync(~0u, sent, kLanes);
  }
}

/// Sums over the eight rows of lanes: lane 4 g + t gets columns kSize / 8 g ... of its kSize.
template <int kSize>
__device__ void sum_over_rows(float (&column)[kSize]) {
  halve<16, kSize / 2>(column);
  halve<8, kSize / 4>(column);
  halve<4, kSize / 8>(column);
}

template <typename M, Forward kForward>
class Consumer {
 public:
  static constexpr int kDim = M::kDim, kKeys = M::kKeys;
  static constexpr bool kSymmetric = kForward == Forward::kSymmetric, kOnline = kForward == Forward::kOnline;
  using T = typename M::Element;

  __device__ Consumer(M &memory, const ForwardProblem &p, float multiplier, int first)
      : m(memory),
        multiplier(multiplier),
        consumer(int(threadIdx.x) - kGroup),
        lane(threadIdx.x % kWarp),
        group(warpgroup() - 1),
        row(first + group * kHalves * kGroupRows + consumer % kGroup / kWarp * 16 + lane / 4),
        count(p.anchors.count()),
        key_count(p.keys.count()),
        self(p.self) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[half][r] = 0.0f;
        maximum[half][r] = kOnline ? -INFINITY : 0.0f;
      }
  }

  /// Adds the tiles of a share; `add_columns(t)` adds the column sums of tile t to the result.
  template <typename AddColumns>
  __device__ void run(const Order &order, Share share, AddColumns add_columns) {
    ptx::barrier_wait(&m.ring.own_full, 0);
    int t = share.first;
    for (; t < share.masked; ++t) add_tile<true>(order.start(t), t, share.first, add_columns);
    for (; t < share.last; ++t) add_tile<false>(order.start(t), t, share.first, add_columns);
    if (kSymmetric && share.first < share.last) {
      ptx::barrier_of(kColumnsBarrier, kConsumers * kGroup);
      add_columns(share.last - 1);
    }
  }

  /// Sums of tile t over all rows of the block: of the column that this thread has, if it has one.
  __device__ float column_sum(int t) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) sum += ptx::load_shared(&m.columns[t % 2][w][consumer]);
    return sum;
  }

  /// `result(row, maximum, sum)` for each row of the warp, by one of the four lanes that share it.
  template <typename Result>
  __device__ void finish(Result result) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowSum<kOnline> sum{maximum[half][r], total[half][r]};
        sum.meet(multiplier);
        if (lane % 4 == 0) result(row + half * kGroupRows + 8 * r, sum.maximum, sum.total);
      }
  }

  M &m;
  const float multiplier;
  const int consumer, lane;

 private:
  __device__ void begin(float (&x)[kKeys / 2], int half, int use) {
    start_product<T, kDim>(x, m.own[group * kHalves + half], m.keys[Stage<M::kStages>(use).number]);
  }

  /// A lane's value v = 4 n + 2 r + i is of row + 8 r and key + 8 n + 2 (lane % 4) + i.
  template <bool kMasked>
  __device__ float value(const float (&x)[kKeys / 2], int v, const Mask &mask) const {
    return kMasked && mask.leaves_out(v / 4 * 8 + v % 2, v / 2 % 2 * 8) ? -INFINITY : x[v];
  }

  template <bool kMasked, typename AddColumns>
  __device__ void add_tile(int key, int t, int first_tile, AddColumns add_columns) {
    const int use = t - first_tile;
    float x0[kKeys / 2], x1[kKeys / 2], column[kKeys / 4];
    m.ring.wait_until_full(use);
    begin(x0, 0, use);
    begin(x1, 1, use);
    if (kSymmetric && t > first_tile) {
      ptx::barrier_of(kColumnsBarrier, kConsumers * kGroup);  // the columns of tile t - 1 are written
      add_columns(t - 1);
    }
    ptx::group_wait_for<1>(x0);
    add<kMasked>(x0, column, 0, key);
    ptx::group_wait_for<0>(x1);
    m.ring.release(use);
    add<kMasked>(x1, column, 1, key);
    if (kSymmetric) write_columns(column, t);
  }

  template <bool kMasked>
  __device__ void add(const float (&x)[kKeys / 2], float (&column)[kKeys / 4], int half, int key) {
    const int own = row + half * kGroupRows;
    const Mask mask(self, own, key + 2 * (lane % 4), key_count, kSymmetric ? count : INT_MAX);
    float shift[2] = {0.0f, 0.0f};
    if (kOnline) raise_maximum<kMasked>(x, half, mask, shift);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float upper = ptx::exp2((value<kMasked>(x, 4 * n + i, mask) - shift[0]) * multiplier);
        const float lower = ptx::exp2((value<kMasked>(x, 4 * n + 2 + i, mask) - shift[1]) * multiplier);
        total[half][0] += upper;
        total[half][1] += lower;
        if (kSymmetric) column[2 * n + i] = half == 0 ? upper + lower : column[2 * n + i] + (upper + lower);
      }
  }

  template <bool kMasked>
  __device__ void raise_maximum(const float (&x)[kKeys / 2], int half, const Mask &mask, float (&shift)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum[half][r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) largest = fmaxf(largest, value<kMasked>(x, 4 * n + 2 * r + i, mask));
      shift[r] = largest == -INFINITY ? 0.0f : largest;
      total[half][r] *= ptx::exp2((maximum[half][r] - shift[r]) * multiplier);
      maximum[half][r] = largest;
    }
  }

  __device__ void write_columns(float (&column)[kKeys / 4], int t) {
    constexpr int kEach = kKeys / 32;  // columns a lane ends with
    sum_over_rows(column);
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int mine = lane / 4 * kEach + c;
      ptx::store_shared(&m.columns[t % 2][consumer / kWarp][mine / 2 * 8 + 2 * (lane % 4) + mine % 2], column[c]);
    }
  }

  const int group, row, count, key_count;
  const bool self;
  float total[kHalves][2], maximum[kHalves][2];
};

template <typename T, int kDim, Forward kForward>
__global__ void __launch_bounds__(kThreads, 1)
    lse_forward_sm90a(const __grid_constant__ CUtensorMap anchors, const __grid_constant__ CUtensorMap keys,
                      const ForwardProblem p) {
  using M = Memory<T, kDim>;
  constexpr bool kSymmetric = kForward == Forward::kSymmetric;
  extern __shared__ __align__(1024) unsigned char shared[];
  M &m = *reinterpret_cast<M *>(shared);
  const int first = int(blockIdx.x) * kRows, count = p.anchors.count(), key_count = p.keys.count();
  const Order order = first >= count ? Order()
                      : kSymmetric   ? Order::of_circle(M::kKeys, count, int(blockIdx.x), kRows)
                                     : Order::of_keys(M::kKeys, key_count, p.self, first, kRows);
  const Share share(order);
  m.ring.init();
  if (threadIdx.x < kGroup) {
    ptx::fewer_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    ptx::barrier_expect(&m.ring.own_full, int(sizeof m.own));
    for (int r = 0; r < kRowTiles; ++r)
      for (int c = 0; c < kDim / kColumn; ++c)
        ptx::tensor_copy(m.own[r][c], &anchors, &m.ring.own_full, c * kColumn, first + r * kGroupRows);
    for (int t = share.first; t < share.last; ++t) {
      const Stage<M::kStages> stage(t - share.first);
      m.ring.wait_until_empty(t - share.first);
      ptx::barrier_expect(&m.ring.full[stage.number], int(sizeof m.keys[0]));
      for (int c = 0; c < kDim / kColumn; ++c)
        ptx::tensor_copy(m.keys[stage.number][c], &keys, &m.ring.full[stage.number], c * kColumn, order.start(t));
    }
    return;
  }
  ptx::more_registers<kConsumerRegisters>();
  const float scale = p.scale.get();
  Consumer<M, kForward> consumer(m, p, scale * kLog2E, first);
  consumer.run(order, share, [&](int t) {
    if (order.is_own(t) || consumer.consumer >= M::kKeys) return;
    const int column = order.start(t) + consumer.consumer;
    const float sum = consumer.column_sum(t);
    if (column < count) atomicAdd(p.result + column, sum);
  });
  consumer.finish([&](int row, float maximum, float sum) {
    if (row >= p.anchors.rows) return;
    if (!kSymmetric)
      p.result[int64_t(blockIdx.y) * p.anchors.rows + p.anchors.origin(row)] =
          row < count ? maximum * scale + logf(sum) : 0.0f;
    else if (row < count)
      atomicAdd(p.result + row, sum);
  });
}

template <typename T, int kDim, Forward kForward>
int launch(const ForwardProblem &p, int splits, cudaStream_t stream) {
  using M = Memory<T, kDim>;
  CUtensorMap anchors, keys;
  cudaError_t error = describe<T>(&anchors, p.anchors.values, p.anchors.rows, kDim, kGroupRows);
  if (error == cudaSuccess) error = describe<T>(&keys, p.keys.values, p.keys.rows, kDim, M::kKeys);
  constexpr int kBytes = int(sizeof(M));
  if (error == cudaSuccess) error = allow_shared_memory(lse_forward_sm90a<T, kDim, kForward>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((p.anchors.rows + kRows - 1) / kRows, splits);
  lse_forward_sm90a<T, kDim, kForward><<<grid, kThreads, kBytes, stream>>>(anchors, keys, p);
  return cudaGetLastError();
}

}  // namespace

int forward_sm90a(const ForwardProblem &p, Forward forward, int dtype, int dim, int splits, cudaStream_t stream) {
  return with_rows(dtype, dim, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kDim = columns.value;
    switch (forward) {
      case Forward::kFixed:
        return launch<T, kDim, Forward::kFixed>(p, splits, stream);
      case Forward::kOnline:
        return launch<T, kDim, Forward::kOnline>(p, splits, stream);
      default:
        return launch<T, kDim, Forward::kSymmetric>(p, splits, stream);
    }
  });
}

}  // namespace ak

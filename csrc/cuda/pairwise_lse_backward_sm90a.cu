// pairwise_lse backward by wgmma: gradient_i = scale sum_j G_ij f_j, a block 128 rows, without atomics.
//
// A tile of other rows gives the exponents (along rows) and is the right operand of G f as well (across
// rows); G goes from accumulators to left operand without leaving its registers. The exponents of the next
// tile are under way while those of this one are weighed and its product is summed.
#include "warpgroups.cuh"

namespace ak {
namespace {

constexpr int kRows = kConsumers * kGroupRows;

template <typename T, int kDim_, Backward kBackward>
struct Memory {
  static constexpr int kDim = kDim_;
  // two exponentials a weight need registers that 128 keys would take
  static constexpr int kKeys = kDim == 64 || (kDim == 128 && kBackward != Backward::kBoth) ? 128 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : 3;
  using Element = T;

  T own[kConsumers][kDim / kColumn][kGroupRows * kColumn];
  T keys[kStages][kDim / kColumn][kKeys * kColumn];
  float weights[kStages][kKeys], shifts[kStages][kKeys];
  Ring<kStages> ring;
};

template <typename M, Backward kBackward>
class Consumer {
 public:
  static constexpr int kDim = M::kDim, kKeys = M::kKeys, kStages = M::kStages;
  static constexpr int kWidth = kDim < 128 ? kDim : 128;  // columns of a product G f
  static constexpr int kParts = kDim / kWidth;
  using T = typename M::Element;

  __device__ Consumer(M &memory, const BackwardProblem &p, float multiplier, int first)
      : m(memory),
        multiplier(multiplier),
        lane(threadIdx.x % kWarp),
        group(warpgroup() - 1),
        row(first + group * kGroupRows + threadIdx.x % kGroup / kWarp * 16 + lane / 4),
        key_count(p.other.count()),
        self(p.self) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] = p.own_terms.weights[row + 8 * r];
      shift[r] = kBackward == Backward::kFixed ? 0.0f : p.own_terms.shifts[row + 8 * r];
    }
  }

  __device__ void run(const Order &order, Share share) {
    ptx::barrier_wait(&m.ring.own_full, 0);
    if (share.first == share.last) return clear();
    float x[kKeys / 2];
    uint32_t g[kKeys / 16][4];
    begin_exponents(x, 0);
    ptx::group_wait_for<0>(x);
    if (share.masked > share.first)
      weigh<true>(x, order.start(share.first), 0);
    else
      weigh<false>(x, order.start(share.first), 0);
    pack(g, x);
    int t = share.first + 1;
    for (; t < share.masked; ++t) add_tile<true>(x, g, order.start(t), t - share.first);
    for (; t < share.last; ++t) add_tile<false>(x, g, order.start(t), t - share.first);
    begin_sum(g, share.last - share.first - 1);
    ptx::group_wait<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) ptx::keep_after(total[part]);
  }

  /// `store(row, column, low, high)` for each pair of columns of this thread's two rows.
  template <typename Store>
  __device__ void finish(Store store) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          store(row + 8 * r, part * kWidth + n * 8 + 2 * (lane % 4), total[part][4 * n + 2 * r],
                total[part][4 * n + 2 * r + 1]);
  }

 private:
  __device__ void begin_exponents(float (&x)[kKeys / 2], int use) {
    m.ring.wait_until_full(use);
    start_product<T, kDim>(x, m.own[group], m.keys[Stage<kStages>(use).number]);
  }

  __device__ void begin_sum(const uint32_t (&g)[kKeys / 16][4], int use) {
    const auto &keys = m.keys[Stage<kStages>(use).number];
    const uint64_t right = ptx::descriptor(keys, int(sizeof keys[0]), kRowGroups);
    ptx::group_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
        ptx::group_multiply_add_across<T>(
            total[part], g[step],
            ptx::advance(right, part * kWidth / kColumn * int(sizeof keys[0]) + step * 2 * kRowGroups),
            use > 0 || step > 0);
    ptx::group_commit();
  }

  /// Sums the tile before, whose weights are in g, and weighs this one.
  template <bool kMasked>
  __device__ void add_tile(float (&x)[kKeys / 2], uint32_t (&g)[kKeys / 16][4], int key, int use) {
    begin_exponents(x, use);
    begin_sum(g, use - 1);
    ptx::group_wait_for<1>(x);
    weigh<kMasked>(x, key, use);
    ptx::group_wait<0>();
    m.ring.release(use - 1);
    pack(g, x);
  }

  /// x to G. A lane's value 4 n + 2 r + i is of row + 8 r and key + 8 n + 2 (lane % 4) + i.
  template <bool kMasked>
  __device__ void weigh(float (&x)[kKeys / 2], int key, int use) {
    const int stage = Stage<kStages>(use).number, first_column = 2 * (lane % 4);
    const Mask mask(self, row, key + first_column, key_count);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const int column = n * 8 + first_column;
      const float2 other = ptx::load_shared(reinterpret_cast<const float2 *>(&m.weights[stage][column]));
      float2 other_shift{0.0f, 0.0f};
      if (kBackward != Backward::kFixed)
        other_shift = ptx::load_shared(reinterpret_cast<const float2 *>(&m.shifts[stage][column]));
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &v = x[4 * n + 2 * r + i];
          v = weight_of(v * multiplier, weight[r], shift[r], i ? other.y : other.x,
                        i ? other_shift.y : other_shift.x, std::integral_constant<Backward, kBackward>{});
          if (kMasked && mask.leaves_out(8 * n + i, 8 * r)) v = 0.0f;
        }
    }
  }

  __device__ static void pack(uint32_t (&g)[kKeys / 16][4], const float (&x)[kKeys / 2]) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) g[n / 2][n % 2 * 2 + r] = ptx::pack<T>(x[4 * n + 2 * r], x[4 * n + 2 * r + 1]);
  }

  __device__ void clear() {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int v = 0; v < kWidth / 2; ++v) total[part][v] = 0.0f;
  }

  M &m;
  const float multiplier;
  const int lane, group, row, key_count;
  const bool self;
  float weight[2], shift[2];
  float total[kParts][kWidth / 2];
};

template <typename T, int kDim, Backward kBackward>
__global__ void __launch_bounds__(kThreads, 1)
    lse_backward_sm90a(const __grid_constant__ CUtensorMap own, const __grid_constant__ CUtensorMap other,
                       const BackwardProblem p) {
  using M = Memory<T, kDim, kBackward>;
  extern __shared__ __align__(1024) unsigned char shared[];
  M &m = *reinterpret_cast<M *>(shared);
  const int first = int(blockIdx.x) * kRows, count = p.own.count();
  const Order order = first < count ? Order::of_keys(M::kKeys, p.other.count(), p.self, first, kRows) : Order();
  const Share share(order);
  m.ring.init();
  if (threadIdx.x < kGroup) {
    ptx::fewer_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    ptx::barrier_expect(&m.ring.own_full, int(sizeof m.own));
    for (int r = 0; r < kConsumers; ++r)
      for (int c = 0; c < kDim / kColumn; ++c)
        ptx::tensor_copy(m.own[r][c], &own, &m.ring.own_full, c * kColumn, first + r * kGroupRows);
    constexpr int kTermBytes = M::kKeys * int(sizeof(float));
    constexpr bool kShifts = kBackward != Backward::kFixed;
    for (int t = share.first; t < share.last; ++t) {
      const int stage = Stage<M::kStages>(t - share.first).number, key = order.start(t);
      uint64_t *full = &m.ring.full[stage];
      m.ring.wait_until_empty(t - share.first);
      ptx::barrier_expect(full, int(sizeof m.keys[0]) + (kShifts ? 2 : 1) * kTermBytes);
      for (int c = 0; c < kDim / kColumn; ++c) ptx::tensor_copy(m.keys[stage][c], &other, full, c * kColumn, key);
      ptx::bulk_copy(m.weights[stage], p.other_terms.weights + key, kTermBytes, full);
      if (kShifts) ptx::bulk_copy(m.shifts[stage], p.other_terms.shifts + key, kTermBytes, full);
    }
    return;
  }
  ptx::more_registers<kConsumerRegisters>();
  const float scale = p.scale.get(), factor = scale * (p.peak ? unit_of_half(p.peak) : 1.0f);
  Consumer<M, kBackward> consumer(m, p, scale * kLog2E, first);
  consumer.run(order, share);
  consumer.finish([&](int row, int column, float low, float high) {
    if (row >= p.own.rows) return;
    const bool takes_part = row < count;
    store_gradient<T>(p, p.own.origin(row), column, takes_part ? low * factor : 0.0f,
                      takes_part ? high * factor : 0.0f);
  });
}

template <typename T, int kDim, Backward kBackward>
int launch(const BackwardProblem &p, int splits, cudaStream_t stream) {
  using M = Memory<T, kDim, kBackward>;
  CUtensorMap own, other;
  cudaError_t error = describe<T>(&own, p.own.values, p.own.rows, kDim, kGroupRows);
  if (error == cudaSuccess) error = describe<T>(&other, p.other.values, p.other.rows, kDim, M::kKeys);
  constexpr int kBytes = int(sizeof(M));
  if (error == cudaSuccess) error = allow_shared_memory(lse_backward_sm90a<T, kDim, kBackward>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((p.own.rows + kRows - 1) / kRows, splits);
  lse_backward_sm90a<T, kDim, kBackward><<<grid, kThreads, kBytes, stream>>>(own, other, p);
  return cudaGetLastError();
}

}  // namespace

int backward_sm90a(const BackwardProblem &p, Backward backward, int dtype, int dim, int splits, cudaStream_t stream) {
  return with_rows(dtype, dim, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kDim = columns.value;
    switch (backward) {
      case Backward::kFixed:
        return launch<T, kDim, Backward::kFixed>(p, splits, stream);
      case Backward::kOne:
        return launch<T, kDim, Backward::kOne>(p, splits, stream);
      default:
        return launch<T, kDim, Backward::kBoth>(p, splits, stream);
    }
  });
}

}  // namespace ak

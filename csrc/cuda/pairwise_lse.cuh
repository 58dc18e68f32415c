// What the kernels of pairwise_lse share: their arguments, and the rows' terms.
//
// Rows come packed (pack_rows.cu): those that take part first, zero rows after them, so that no kernel
// reads a mask; of a tile only its end, or the diagonal, can differ from the others.
#pragma once

#include <climits>
#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

#ifndef AK_DIMS
#define AK_DIMS 64, 128, 256  // columns of packed rows that there are kernels for
#endif

namespace ak {

constexpr int kWarp = 32;
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

/// How the exponents of a forward pass are kept in range.
enum class Forward {
  kFixed,      // |exponents| <= 63: as they are, in base 2
  kOnline,     // less the largest so far
  kSymmetric,  // fixed, keys = anchors: a tile serves its rows and its columns
};

/// The weights G_ij of a gradient sum_j G_ij f_j; w = 0 and a = inf where a row has no term.
enum class Backward {
  kFixed,  // 2^x_ij (w_i + w_j)
  kOne,    // 2^(x_ij - a_i - a_j) (w_i + w_j), where only rows or only columns have terms
  kBoth,   // 2^(x_ij - a_i) w_i + 2^(x_ij - a_j) w_j
};

/// Packed rows.
struct Rows {
  const void *values;      // (rows, dim)
  const int *taking_part;  // on the device: how many; null: all
  const int *index;        // where each comes from; null: from where it is
  int rows;

  __device__ int count() const { return taking_part ? *taking_part : rows; }
  __device__ int64_t origin(int row) const { return index ? index[row] : row; }
};

/// Of the products of rows to exponents.
struct Scale {
  float value;
  const float *tensor;  // on the device, another factor; or null

  __device__ float get() const { return tensor ? value * *tensor : value; }
};

struct ForwardProblem {
  Rows anchors, keys;
  bool self;  // keys are the anchors; a row leaves itself out
  Scale scale;
  float *result;  // kSymmetric: (packed anchors) sums to add to; else (splits, anchors) lse
};

struct Terms {
  const float *weights;  // w, in units of `unit_of_half` for float16; whole tiles of 128
  const float *shifts;   // a, in base 2; not read if kFixed
};

struct BackwardProblem {
  Rows own, other;
  bool self;
  Scale scale;
  Terms own_terms, other_terms;
  const float *peak;  // largest |gradient of lse|, for float16, else null
  void *gradient;     // (own rows, columns) of the rows' dtype, or null
  float *partial;     // (splits, own rows, columns) where work is split, else null
  int columns;        // of the gradient, <= dim
};

/// G of an exponent x (in base 2) and the terms of its row and of its column.
template <Backward kBackward>
__device__ inline float weight_of(float x, float weight, float shift, float other, float other_shift,
                                  std::integral_constant<Backward, kBackward>) {
  if constexpr (kBackward == Backward::kFixed) return ptx::exp2(x) * (weight + other);
  if constexpr (kBackward == Backward::kOne) return ptx::exp2(x - (shift + other_shift)) * (weight + other);
  return ptx::exp2(x - shift) * weight + ptx::exp2(x - other_shift) * other;
}

/// Unit of float16 weights: the largest becomes 2^14, so that the sum of two stays below 65504.
__device__ inline float unit_of_half(const float *peak) { return fmaxf(*peak, 1e-30f) / 16384.0f; }

/// Two neighbouring numbers of a row of the gradient, times `factor`.
template <typename T>
__device__ void store_gradient(const BackwardProblem &p, int64_t row, int column, float low, float high) {
  if (column >= p.columns) return;
  const bool both = column + 1 < p.columns;
  if (p.partial) {
    float *at = p.partial + (int64_t(blockIdx.y) * p.own.rows + row) * p.columns + column;
    at[0] = low;
    if (both) at[1] = high;
    return;
  }
  T *at = static_cast<T *>(p.gradient) + row * p.columns + column;
  if (p.columns % 2 == 0) {
    *reinterpret_cast<uint32_t *>(at) = ptx::pack<T>(low, high);
    return;
  }
  at[0] = from_float<T>(low);
  if (both) at[1] = from_float<T>(high);
}

/// In what order a block meets the tiles of other rows: first those of which some products do not count,
/// because they meet the diagonal or end, so that the loop over all the others has no masks.
class Order {
 public:
  int tiles = 0, masked = 0;  // of the first `masked` some products may not count

  /// Tiles of `size` keys; the block's rows begin at `first`, and are keys themselves if `self`.
  __device__ static Order of_keys(int size, int key_count, bool self, int first, int rows) {
    Order order;
    order.size_ = size;
    order.tiles = (key_count + size - 1) / size;
    order.diagonal_ = self ? first / size : 0;
    order.on_diagonal_ = self ? min(rows / size, order.tiles - order.diagonal_) : 0;
    const bool last_is_met = order.on_diagonal_ > 0 && order.diagonal_ + order.on_diagonal_ == order.tiles;
    order.masked = order.on_diagonal_ + (key_count % size != 0 && !last_is_met);
    return order;
  }

  /// Blocks of `rows` rows meet in a circle, so that each pair meets once: a block meets itself, the last
  /// block, if that is in part and in its half of the circle, then the others of its half.
  __device__ static Order of_circle(int size, int count, int own, int rows) {
    Order order;
    order.size_ = size;
    order.blocks_ = (count + rows - 1) / rows;
    order.own_ = own;
    order.a_block_ = rows / size;
    // of an even number of blocks, opposite ones meet from the first half only
    const int met = (order.blocks_ + 1) / 2 + (order.blocks_ % 2 == 0 && own < order.blocks_ / 2);
    order.tiles = met * order.a_block_;
    const bool ends = count % rows != 0, own_ends = ends && own == order.blocks_ - 1;
    const int to_last = order.blocks_ - 1 - own;
    if (ends && !own_ends && to_last < met) order.to_last_ = to_last;
    order.masked = own_ends ? order.tiles : order.a_block_ * (1 + (order.to_last_ > 0));
    return order;
  }

  /// First row of the t-th tile.
  __device__ int start(int t) const {
    if (blocks_) {
      int turn = t / a_block_;
      if (to_last_ && turn > 0) turn = turn == 1 ? to_last_ : turn <= to_last_ ? turn - 1 : turn;
      const int other = own_ + turn;
      return ((other < blocks_ ? other : other - blocks_) * a_block_ + t % a_block_) * size_;
    }
    if (t < on_diagonal_) return (diagonal_ + t) * size_;
    if (t < masked) return (tiles - 1) * size_;
    const int rest = t - masked;
    return (rest < diagonal_ ? rest : rest + on_diagonal_) * size_;
  }

  /// Whether tile t is of a circle's own block, whose rows are its columns.
  __device__ bool is_own(int t) const { return t < a_block_; }

 private:
  int size_ = 0, diagonal_ = 0, on_diagonal_ = 0, blocks_ = 0, own_ = 0, a_block_ = 0, to_last_ = 0;
};

/// Work of one of gridDim.y splits: tiles [first, last), masked ones before `masked`.
struct Share {
  int first, masked, last;
  __device__ explicit Share(const Order &order) {
    const int each = (order.tiles + int(gridDim.y) - 1) / int(gridDim.y);
    first = min(order.tiles, int(blockIdx.y) * each);
    last = min(order.tiles, first + each);
    masked = max(first, min(last, order.masked));
  }
};

/// What a lane has of a row's sum: largest product and, less it, the sum. Not online, maxima are 0.
template <bool kOnline>
struct RowSum {
  float maximum, total;

  /// Sums over the four lanes that share a row.
  __device__ void meet(float multiplier) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const float other = __shfl_xor_sync(~0u, total, lanes);
      if (!kOnline) {
        total += other;
        continue;
      }
      const float other_maximum = __shfl_xor_sync(~0u, maximum, lanes), largest = fmaxf(maximum, other_maximum);
      const float shift = largest == -INFINITY ? 0.0f : largest;
      total = total * ptx::exp2((maximum - shift) * multiplier) + other * ptx::exp2((other_maximum - shift) * multiplier);
      maximum = largest;
    }
  }
};

/// Which products of a thread do not count: beyond the last key or row, or of a row with itself.
struct Mask {
  int diagonal, keys_left, rows_left;
  __device__ Mask(bool self, int row, int key, int key_count, int row_count = INT_MAX)
      : diagonal(self ? row - key : INT_MIN), keys_left(key_count - key), rows_left(row_count - row) {}
  /// The product of `row` + row_offset and `key` + key_offset.
  __device__ bool leaves_out(int key_offset, int row_offset) const {
    return key_offset >= keys_left || key_offset - row_offset == diagonal || row_offset >= rows_left;
  }
};

/// Calls `function` with the Type of a 16-bit dtype and the dim as a constant.
template <typename Function, int... kDims>
int with_dims(int dtype, int dim, Function function, std::integer_sequence<int, kDims...>) {
  int code = AK_CUDA_BAD_SHAPE;
  auto try_dim = [&](auto constant) {
    if (dim != constant.value) return;
    code = dtype == AK_CUDA_BFLOAT16  ? function(Type<__nv_bfloat16>{}, constant)
           : dtype == AK_CUDA_FLOAT16 ? function(Type<__half>{}, constant)
                                      : AK_CUDA_BAD_DTYPE;
  };
  (try_dim(std::integral_constant<int, kDims>{}), ...);
  return code;
}
template <typename Function>
int with_rows(int dtype, int dim, Function function) {
  return with_dims(dtype, dim, function, std::integer_sequence<int, AK_DIMS>{});
}

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// By mma.sync (sm_80 and later), and by wgmma (sm_90a).
int forward_sm80(const ForwardProblem &, Forward, int dtype, int dim, int splits, cudaStream_t);
int forward_sm90a(const ForwardProblem &, Forward, int dtype, int dim, int splits, cudaStream_t);
int backward_sm80(const BackwardProblem &, Backward, int dtype, int dim, int splits, cudaStream_t);
int backward_sm90a(const BackwardProblem &, Backward, int dtype, int dim, int splits, cudaStream_t);

}  // namespace ak

// The inner loops, for any instruction set I (vector_*.h): a block of scores, a block of a product with
// the weights, and the exponential. Accumulators are arrays that must live in registers: GCC keeps them
// there only if every loop over them is unrolled and the function inlined.
#pragma once

#include <cstdint>

#define AK_INLINE __attribute__((always_inline)) inline
#define AK_UNROLL _Pragma("GCC unroll 16")

namespace {

// Tiles of scores are at most tile_rows × tile_rows; every block size below divides it.
constexpr int tile_rows = 192;

// Stands for −∞ where a difference of two of them must stay defined.
constexpr float lowest = -3.402823466e38f;

// Sizes that follow from an instruction set's register blocking.
template <class I>
struct Blocking {
  static constexpr int panel = I::score_vectors * I::lanes;    // keys side by side in a block of scores
  static constexpr int slice = I::product_vectors * I::lanes;  // columns of features side by side
  static_assert(panel % I::score_rows == 0 && panel % I::product_rows == 0, "rows come in whole panels");
  static_assert(tile_rows % panel == 0, "tiles come in whole panels");
};

template <class I>
using ScoreBlock = typename I::Vec[I::score_rows][I::score_vectors];

template <class I>
using ProductBlock = typename I::Vec[I::product_rows][I::product_vectors];

// scores[r][:] = Σ_k rows[r, k] · panel[k, :]. `rows` is the first row's place in the first slice, slices
// lie `slice_stride` apart; `panel` holds dim × Blocking::panel values.
template <class I>
AK_INLINE void score_block(const float* rows, int64_t slice_stride, const float* panel, int64_t dim,
                           ScoreBlock<I>& scores) {
  constexpr int slice = Blocking<I>::slice;
  AK_UNROLL for (int r = 0; r < I::score_rows; ++r)
    AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) scores[r][v] = I::zero();
  for (int64_t start = 0; start < dim; start += slice, rows += slice_stride) {
    const int64_t columns = dim - start < slice ? dim - start : slice;
    for (int64_t k = 0; k < columns; ++k, panel += Blocking<I>::panel) {
      typename I::Vec keys[I::score_vectors];
      AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) keys[v] = I::load(panel + v * I::lanes);
      AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
        const typename I::Vec row = I::broadcast(rows + r * slice + k);
        AK_UNROLL for (int v = 0; v < I::score_vectors; ++v)
          scores[r][v] = I::fma(row, keys[v], scores[r][v]);
      }
    }
  }
}

// sums[r][:] = Σ_k weight(r, k) · features[k, :] over `depth` rows of one slice, where weight(r, k) is
// weights[r, k], or weights[k, r] if Transposed; `weights` has tile_rows columns.
template <class I, bool Transposed, int Vectors>
AK_INLINE void product_block(const float* weights, int64_t depth, const float* features,
                             typename I::Vec (&sums)[I::product_rows][Vectors]) {
  AK_UNROLL for (int r = 0; r < I::product_rows; ++r)
    AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::zero();
  for (int64_t k = 0; k < depth; ++k) {
    typename I::Vec feature[Vectors];
    AK_UNROLL for (int v = 0; v < Vectors; ++v)
      feature[v] = I::load(features + k * Blocking<I>::slice + v * I::lanes);
    AK_UNROLL for (int r = 0; r < I::product_rows; ++r) {
      const typename I::Vec weight =
          I::broadcast(Transposed ? weights + k * tile_rows + r : weights + r * tile_rows + k);
      AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::fma(weight, feature[v], sums[r][v]);
    }
  }
}

// 2^x for x < 127, relative error < 1.7e-7; exactly 0 for x ≤ −127; NaN for NaN.
//
// Adding 1.5·2^23 + 127 rounds x to an integer n and leaves n + 127, the exponent field of 2^n, in the
// low bits of the sum; the rest, in [−½, ½], goes through the polynomial of degree 5 with the least
// relative error among those with p(0) = 1. (No -ffast-math: it would cancel the constant.)
template <class I>
AK_INLINE typename I::Vec exp2_lanes(typename I::Vec x) {
  const typename I::Vec rounder = I::set(12582912.0f + 127.0f);
  x = I::at_least(I::set(-127.0f), x);
  const typename I::Vec shifted = I::add(x, rounder);
  const typename I::Vec rest = I::subtract(x, I::subtract(shifted, rounder));
  typename I::Vec p = I::set(0.001326472032815218f);
  p = I::fma(p, rest, I::set(0.009671512991189957f));
  p = I::fma(p, rest, I::set(0.05550733953714371f));
  p = I::fma(p, rest, I::set(0.24022242426872253f));
  p = I::fma(p, rest, I::set(0.6931470036506653f));
  p = I::fma(p, rest, I::set(1.0f));
  return I::multiply(p, I::to_exponent(shifted));
}

template <class I>
AK_INLINE float sum_of_lanes(typename I::Vec x) {
  float lanes[I::lanes], sum = 0;
  I::store(lanes, x);
  for (int lane = 0; lane < I::lanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace

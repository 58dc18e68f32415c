// The inner loops, for any instruction set I (vector_*.h): a block of scores, a block of a product with
// the weights, and the exponential.
//
// The accumulators are arrays that must live in registers throughout. GCC keeps them there only if every
// loop over them is unrolled, and if nothing else competes for registers: hence functions of their own
// that are never inlined and hand their results over through memory (a few stores in hundreds of
// products). A test reads the compiled loops.
#pragma once

#include <cstdint>

#include "tile_kernels.h"

#define AK_INLINE __attribute__((always_inline)) inline
#define AK_NOINLINE __attribute__((noinline))
#define AK_UNROLL _Pragma("GCC unroll 16")

namespace {

// Tiles of scores are at most tile_rows × tile_rows; every block size below divides it.
constexpr int tile_rows = 192;

// Score of a pair that does not count. Where scores are bounded: its power of two is 0. Elsewhere: stands
// for −∞, but a difference of two of them stays defined.
constexpr float masked_if_bounded = -127.0f;
constexpr float lowest = -3.402823466e38f;

// Sizes that follow from an instruction set's register blocking.
//
// A multiply-add takes 32-bit *words*: a float32, or where I::depth is 2 a pair of bfloat16 that stand next
// to each other along the sum, both of whose products it adds. Arrays of words are declared as float.
template <class I>
struct Blocking {
  static constexpr int panel = I::score_vectors * I::lanes;    // keys side by side in a block of scores
  static constexpr int slice = I::product_vectors * I::lanes;  // columns of features side by side
  static_assert(panel % I::score_rows == 0 && panel % I::product_rows == 0, "rows come in whole panels");
  static_assert(tile_rows % panel == 0, "tiles come in whole panels");
  static_assert(panel % I::depth == 0, "words pair rows of one panel");
};

// Words that hold `count` elements.
template <class I>
constexpr int64_t words_of(int64_t count) {
  return (count + I::depth - 1) / I::depth;
}

// Floats in the vectors that hold `count` of them.
template <class I>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + I::lanes - 1) / I::lanes * I::lanes;
}

// Words in a row of a panel for rows of `dim` elements: whole tiles, if there are tiles.
template <class I>
constexpr int64_t panel_words(int64_t dim) {
  const int64_t words = words_of<I>(dim);
  return has_tiles<I> ? (words + tile_words - 1) / tile_words * tile_words : words;
}

// Asks for `count` floats from `place` on, which may lie beyond the end of an array.
template <int count>
AK_INLINE void prefetch(const float* place) {
  constexpr int line = 16;
  AK_UNROLL for (int i = 0; i < count; i += line) __builtin_prefetch(place + i);
}

// out[r, :] = Σ_k rows[r, k] · panel[k, :] over `words` words, times `factor` where it cannot be folded into
// the panel without rounding it (pairs of bfloat16). `rows` is the first row's place in the first slice,
// slices lie `slice_stride` apart; `panel` holds words × Blocking::panel; rows of `out` lie `out_stride` apart.
template <class I>
AK_NOINLINE void score_block(const float* rows, int64_t slice_stride, const float* panel, int64_t words,
                             float factor, float* out, int64_t out_stride) {
  if constexpr (has_tiles<I>) return score_block_of_tiles<I>(rows, slice_stride, panel, words, factor, out, out_stride);
  constexpr int slice = Blocking<I>::slice;
  typename I::Vec scores[I::score_rows][I::score_vectors];
  AK_UNROLL for (int r = 0; r < I::score_rows; ++r)
    AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) scores[r][v] = I::zero();
  for (int64_t start = 0; start < words; start += slice, rows += slice_stride) {
    const int64_t columns = words - start < slice ? words - start : slice;
    // The next block's rows: too many slices at once for the processor's own prefetching.
    AK_UNROLL for (int r = 0; r < I::score_rows; ++r) prefetch<slice>(rows + (I::score_rows + r) * slice);
    for (int64_t k = 0; k < columns; ++k, panel += Blocking<I>::panel) {
      typename I::Vec keys[I::score_vectors];
      AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) keys[v] = I::load(panel + v * I::lanes);
      AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
        const typename I::Vec row = I::broadcast(rows + r * slice + k);
        AK_UNROLL for (int v = 0; v < I::score_vectors; ++v)
          scores[r][v] = I::multiply_add(row, keys[v], scores[r][v]);
      }
    }
  }
  AK_UNROLL for (int r = 0; r < I::score_rows; ++r)
    AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
      if (I::depth > 1) scores[r][v] = I::multiply(I::set(factor), scores[r][v]);
      I::store(out + r * out_stride + v * I::lanes, scores[r][v]);
    }
}

// out[r, :] += Σ_k weight(r, k) · features[k, :] over `words` words (rows, or pairs of them) of one slice,
// where weight(r, k) is weights[r, k], or weights[k, r] if Transposed (not with tiles); `weights` has tile_rows
// columns, which are words_of(tile_rows) words if not Transposed. Of each row's Vectors × lanes values `columns` are added.
template <class I, bool Transposed, int Vectors>
AK_NOINLINE void product_block(const float* weights, int64_t words, const float* features, int64_t columns,
                               float* const* out, int64_t out_rows) {
  constexpr int64_t row_words = words_of<I>(tile_rows);
  if constexpr (has_tiles<I>) {
    return product_block_of_tiles<I, Vectors>(weights, row_words, words, features, columns, out, out_rows);
  }
  typename I::Vec sums[I::product_rows][Vectors];
  AK_UNROLL for (int r = 0; r < I::product_rows; ++r)
    AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::zero();
  // Rows of the gradient lie dim apart, so that each first touch would wait for memory at the end.
  for (int64_t r = 0; r < out_rows; ++r) prefetch<Vectors * I::lanes>(out[r]);
  for (int64_t k = 0; k < words; ++k) {
    typename I::Vec feature[Vectors];
    AK_UNROLL for (int v = 0; v < Vectors; ++v)
      feature[v] = I::load(features + k * Blocking<I>::slice + v * I::lanes);
    AK_UNROLL for (int r = 0; r < I::product_rows; ++r) {
      const typename I::Vec weight =
          I::broadcast(Transposed ? weights + k * tile_rows + r : weights + r * row_words + k);
      AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::multiply_add(weight, feature[v], sums[r][v]);
    }
  }
  if (columns == Vectors * I::lanes) {
    AK_UNROLL for (int r = 0; r < I::product_rows; ++r) {
      if (r == out_rows) return;
      AK_UNROLL for (int v = 0; v < Vectors; ++v)
        I::store(out[r] + v * I::lanes, I::add(I::load(out[r] + v * I::lanes), sums[r][v]));
    }
  } else {
    float values[I::product_rows][Vectors * I::lanes];
    AK_UNROLL for (int r = 0; r < I::product_rows; ++r)
      AK_UNROLL for (int v = 0; v < Vectors; ++v) I::store(values[r] + v * I::lanes, sums[r][v]);
    for (int64_t r = 0; r < out_rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r][c] += values[r][c];
  }
}

// 2^rest for |rest| ≤ ½: the polynomial of degree 5 with the least relative error among those with
// p(0) = 1, error < 1.7e-7 with rounding.
template <class I>
AK_INLINE typename I::Vec exp2_of_rest(typename I::Vec rest) {
  typename I::Vec p = I::set(0.001326472032815218f);
  p = I::fma(p, rest, I::set(0.009671512991189957f));
  p = I::fma(p, rest, I::set(0.05550733953714371f));
  p = I::fma(p, rest, I::set(0.24022242426872253f));
  p = I::fma(p, rest, I::set(0.6931470036506653f));
  return I::fma(p, rest, I::set(1.0f));
}

// 2^x for −126 ≤ x < 127, and exactly 0 for x = −127. Not for NaN.
//
// Adding 1.5·2^23 rounds x to an integer n and leaves n in the low bits of the sum, whence it is added to
// the exponent of 2^(x − n). (No -ffast-math: it would cancel the constant.)
template <class I>
AK_INLINE typename I::Vec exp2_bounded(typename I::Vec x) {
  const typename I::Vec rounder = I::set(12582912.0f);
  const typename I::Vec shifted = I::add(x, rounder);
  const typename I::Vec rest = I::subtract(x, I::subtract(shifted, rounder));
  return I::add_bits(exp2_of_rest<I>(rest), I::to_exponent(shifted));
}

// e^x for x < 88: 0 for x ≤ −88.1, NaN for NaN (which a product passes on, an addition of bits would not).
template <class I>
AK_INLINE typename I::Vec exp_any(typename I::Vec x) {
  const typename I::Vec rounder = I::set(12582912.0f + 127.0f);  // leaves the exponent field of 2^n
  x = I::at_least(I::set(-127.0f), I::multiply(x, I::set(1.44269504f)));
  const typename I::Vec shifted = I::add(x, rounder);
  const typename I::Vec rest = I::subtract(x, I::subtract(shifted, rounder));
  return I::multiply(exp2_of_rest<I>(rest), I::to_exponent(shifted));
}

template <class I>
AK_INLINE float sum_of_lanes(typename I::Vec x) {
  float lanes[I::lanes], sum = 0;
  I::store(lanes, x);
  for (int lane = 0; lane < I::lanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace

// The inner loops for instruction sets that multiply tiles: I::Tiles has eight registers of 16 rows of 16
// words, and a product of two of them added to a third (`dot`: 512 × 16 pairs at once). Blocks are 32 × 32,
// four accumulators. Words are those of micro_kernels.h: a tile of panels or features is 16 words deep as
// it lies in memory, one of rows or weights too, if weights lie by the rows of the result.
#pragma once

#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t tile_words = 16;  // words in a row of a tile, and its rows

template <class I, class = void>
constexpr bool has_tiles = false;
template <class I>
constexpr bool has_tiles<I, std::void_t<typename I::Tiles>> = true;

// Makes a thread ready for tiles while it lives; leaves other code's use of them as it was.
template <class I, bool = has_tiles<I>>
struct TileSession {
  TileSession() {}
};
template <class I>
struct TileSession<I, true> {
  typename I::Tiles::Session session;
};

// Accumulators 0 … 3 += first factor's two tiles (32 rows, `first_stride` floats apart) times the second
// factor's (16 words deep, `second_stride` apart, `Vectors` tiles side by side).
template <class I, int Vectors>
inline void add_tile_products(const float* first, int64_t first_stride, const float* second, int64_t second_stride) {
  using T = typename I::Tiles;
  T::template load<4>(first, first_stride);
  T::template load<5>(first + tile_words * first_stride, first_stride);
  T::template load<6>(second, second_stride);
  T::template dot<0, 4, 6>();
  T::template dot<2, 5, 6>();
  if constexpr (Vectors > 1) {
    T::template load<7>(second + tile_words, second_stride);
    T::template dot<1, 4, 7>();
    T::template dot<3, 5, 7>();
  }
}

template <class I>
inline void clear_tiles() {
  using T = typename I::Tiles;
  T::template clear<0>();
  T::template clear<1>();
  T::template clear<2>();
  T::template clear<3>();
}

template <class I, int Vectors>
inline void store_tiles(float* out, int64_t stride) {
  using T = typename I::Tiles;
  T::template store<0>(out, stride);
  T::template store<2>(out + tile_words * stride, stride);
  if constexpr (Vectors > 1) {
    T::template store<1>(out + tile_words, stride);
    T::template store<3>(out + tile_words * stride + tile_words, stride);
  }
}

// As score_block; `words` is a multiple of 16, and what pads the rows and the panel is zero.
template <class I>
void score_block_of_tiles(const float* rows, int64_t slice_stride, const float* panel, int64_t words, float factor,
                          float* out, int64_t out_stride) {
  constexpr int64_t slice = I::product_vectors * I::lanes, width = I::score_vectors * I::lanes;
  clear_tiles<I>();
  for (int64_t k = 0; k < words; k += tile_words) {
    add_tile_products<I, I::score_vectors>(rows + k / slice * slice_stride + k % slice, slice, panel + k * width, width);
  }
  store_tiles<I, I::score_vectors>(out, out_stride);
  for (int r = 0; r < I::score_rows; ++r)
    for (int v = 0; v < I::score_vectors; ++v) {
      float* place = out + r * out_stride + v * I::lanes;
      I::store(place, I::multiply(I::set(factor), I::load(place)));
    }
}

// As product_block with weights by the rows of the result, `weight_stride` words apart; `words` is a
// multiple of 16.
template <class I, int Vectors>
void product_block_of_tiles(const float* weights, int64_t weight_stride, int64_t words, const float* features,
                            int64_t columns, float* const* out, int64_t out_rows) {
  constexpr int64_t slice = I::product_vectors * I::lanes, width = Vectors * I::lanes;
  clear_tiles<I>();
  for (int64_t k = 0; k < words; k += tile_words) {
    add_tile_products<I, Vectors>(weights + k, weight_stride, features + k * slice, slice);
  }
  alignas(64) float sums[I::product_rows * width];
  store_tiles<I, Vectors>(sums, width);
  for (int64_t r = 0; r < out_rows; ++r) {
    if (columns == width) {
      for (int v = 0; v < Vectors; ++v) {
        float* place = out[r] + v * I::lanes;
        I::store(place, I::add(I::load(place), I::load(sums + r * width + v * I::lanes)));
      }
    } else {
      for (int64_t c = 0; c < columns; ++c) out[r][c] += sums[r * width + c];
    }
  }
}

}  // namespace

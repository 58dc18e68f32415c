// Rows copied into the forms that the inner loops read, in words (micro_kernels.h): panels (keys of a block
// of scores side by side), slices (some words of all rows together, the rows of scores) and features (some
// columns of all rows together, the second factor of products). A word of panels and slices pairs neighbouring
// columns, one of features neighbouring rows; where a word is one float, slices and features are the same
// and the scale is folded into the panels. Rows that the mask leaves out are not copied at all: the kernels
// see a dense set of valid rows, and `index` leads back.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include <cstring>

#include "classes.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "parallel.h"

namespace {

// Cuts a workspace into aligned pieces. With base NULL it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)), next_(aligned(base_)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ = aligned(next_ + static_cast<uintptr_t>(count) * sizeof(T));
    return piece;
  }

  // Enough for any alignment of the base.
  int64_t bytes() const { return static_cast<int64_t>(next_ - base_ + alignment); }

 private:
  static constexpr uintptr_t alignment = 64;
  static uintptr_t aligned(uintptr_t address) { return (address + alignment - 1) / alignment * alignment; }
  uintptr_t base_;
  uintptr_t next_;
};

// Asks for a row, which may lie beyond the last one.
inline void ask_for_row(const ak_rows& rows, int64_t row, int64_t dim) {
  const int64_t bytes = element_size(rows.dtype);
  const char* place = static_cast<const char*>(rows.data) + row * rows.row_stride * bytes;
  for (int64_t byte = 0; byte < dim * bytes; byte += 64) __builtin_prefetch(place + byte);
}

// Which forms of a side's rows a pass reads.
struct Uses {
  bool slices, panels, features;
};

// Forms that are not needed are NULL.
struct PackedRows {
  float* slices = nullptr;    // [slice][padded row][Blocking::slice]
  float* panels = nullptr;    // [panel][word][Blocking::panel]
  float* features = nullptr;  // [slice][padded row / depth][Blocking::slice]
  int64_t* index = nullptr;  // original row of each valid row; NULL: the same
  float* panel_norms = nullptr;  // greatest squared norm in each panel
  int64_t capacity = 0;  // padded rows there is room for
  int64_t valid = 0;
  int64_t padded = 0;  // valid, rounded up to whole panels; rows beyond valid are zero

  int64_t original(int64_t row) const { return index ? index[row] : row; }
};

template <class I>
int64_t round_up_to_panel(int64_t rows) {
  constexpr int64_t panel = Blocking<I>::panel;
  return (rows + panel - 1) / panel * panel;
}

template <class I>
PackedRows take_packed_rows(Arena& arena, const ak_rows& rows, int64_t dim, Uses uses) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  const auto whole_slices = [](int64_t count) { return (count + slice - 1) / slice * slice; };
  const int64_t words = panel_words<I>(dim);
  PackedRows packed;
  packed.capacity = round_up_to_panel<I>(rows.rows);
  if constexpr (I::depth == 1) {
    const bool needed = uses.slices || uses.features;
    packed.slices = packed.features = needed ? arena.take<float>(whole_slices(dim) * packed.capacity) : nullptr;
  } else {
    if (uses.slices) packed.slices = arena.take<float>(whole_slices(words) * packed.capacity);
    if (uses.features) packed.features = arena.take<float>(whole_slices(dim) * (packed.capacity / I::depth));
  }
  packed.panels = uses.panels ? arena.take<float>(packed.capacity * words) : nullptr;
  packed.index = rows.mask || rows.labels ? arena.take<int64_t>(rows.rows) : nullptr;
  packed.panel_norms = arena.take<float>(packed.capacity / panel);
  return packed;
}

// Which rows are valid, those with labels in the order of their classes; sets index, valid and padded.
template <class I>
void select_rows(const ak_rows& rows, PackedRows& packed) {
  packed.valid = rows.rows;
  if (rows.labels) {
    packed.valid = action_kernels::order_by_class(rows.labels, rows.rows, packed.index);
  } else if (rows.mask) {
    packed.valid = 0;
    for (int64_t row = 0; row < rows.rows; ++row) {
      if (rows.mask[row]) packed.index[packed.valid++] = row;
    }
  }
  packed.padded = round_up_to_panel<I>(packed.valid);
}

// to[c, r] = from[r, c], times `factor` if Scaled, for a 4 × 4 block. Without a factor bits stay as they are.
template <bool Scaled>
AK_INLINE void transpose_block(const float* from, int64_t from_stride, float factor, float* to, int64_t to_stride) {
#if defined(__SSE__)
  __m128 row[4];
  AK_UNROLL for (int r = 0; r < 4; ++r) {
    row[r] = _mm_loadu_ps(from + r * from_stride);
    if (Scaled) row[r] = _mm_mul_ps(_mm_set1_ps(factor), row[r]);
  }
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  AK_UNROLL for (int c = 0; c < 4; ++c) _mm_storeu_ps(to + c * to_stride, row[c]);
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_stride + r] = Scaled ? factor * from[r * from_stride + c] : from[r * from_stride + c];
#endif
}

// A panel's words [row][slice] side by side: keys[k, r] = rows[r, k], times `factor` where words are floats.
template <class I>
void fill_panel(const float* rows, int64_t words, float factor, float* keys) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  constexpr bool scaled = I::depth == 1;
  const int64_t whole = words / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4)
    for (int64_t r = 0; r < panel; r += 4)
      transpose_block<scaled>(rows + r * slice + k, slice, factor, keys + k * panel + r, panel);
  for (int64_t k = whole; k < words; ++k)
    for (int64_t r = 0; r < panel; ++r) {
      if (scaled) keys[k * panel + r] = factor * rows[r * slice + k];
      else std::memcpy(keys + k * panel + r, rows + r * slice + k, sizeof(float));
    }
}

// A panel's rows [row][slice] of floats as words, each row's own: half a slice of each of `rows`.
template <class I>
void pair_columns(const float* block, float* rows) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  for (int64_t r = 0; r < panel; ++r)
    for (int64_t k = 0; k < slice / I::depth; k += I::lanes)
      I::store(rows + r * slice + k, I::pair_neighbours(block + r * slice + k * I::depth));
}

// A panel's rows [row][slice] of floats as words that pair rows.
template <class I>
void pair_rows(const float* block, float* features) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  for (int64_t r = 0; r < panel; r += I::depth, features += slice)
    for (int64_t k = 0; k < slice; k += I::lanes)
      I::store(features + k, I::pair(I::load(block + r * slice + k), I::load(block + (r + 1) * slice + k)));
}

// One slice of the rows of a panel: `columns` values of each as float32 in `block`, zero beyond them and
// beyond the valid rows; adds to each row's squares.
template <class I>
void load_slice(const ak_rows& rows, const PackedRows& packed, int64_t first_row, int64_t start, int64_t columns,
                float* block, typename I::Vec* squares) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  for (int64_t r = 0; r < panel; ++r) {
    float* row = block + r * slice;
    const bool is_valid = first_row + r < packed.valid;
    for (int64_t k = is_valid ? columns : 0; k < slice; ++k) row[k] = 0;
    if (!is_valid) continue;
    const int64_t place = packed.original(first_row + r) * rows.row_stride + start;
    // A constant count where it can be, so that no call is made for a few bytes.
    if (columns == slice) {
      load_floats(rows.data, rows.dtype, place, slice, row);
    } else {
      load_floats(rows.data, rows.dtype, place, columns, row);
    }
    for (int64_t k = 0; k < slice; k += I::lanes) {
      const typename I::Vec x = I::load(row + k);
      squares[r] = I::fma(x, x, squares[r]);
    }
  }
}

// One slice of the rows of a panel, of `columns` columns from `start` on, into the forms needed.
template <class I>
void pack_slice(const ak_rows& rows, PackedRows& packed, int64_t first_row, int64_t start, int64_t columns,
                int64_t dim, float factor, typename I::Vec* squares) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  const int64_t word = start / I::depth;
  float local[panel * slice];
  float* words = local;  // [row][slice]
  if (packed.slices) words = packed.slices + word / slice * slice * packed.capacity + first_row * slice + word % slice;
  if constexpr (I::depth == 1) {
    load_slice<I>(rows, packed, first_row, start, columns, words, squares);
  } else {
    float block[panel * slice];
    load_slice<I>(rows, packed, first_row, start, columns, block, squares);
    pair_columns<I>(block, words);
    if (packed.features) pair_rows<I>(block, packed.features + (start * packed.capacity + first_row * slice) / I::depth);
  }
  if (!packed.panels) return;
  fill_panel<I>(words, panel_words<I>(columns), factor, packed.panels + first_row * panel_words<I>(dim) + word * panel);
}

// The larger; NaN if either is.
inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }

template <class I>
void pack_panel(const ak_rows& rows, PackedRows& packed, int64_t index, int64_t dim, float factor) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  typename I::Vec squares[panel];
  for (int64_t r = 0; r < panel; ++r) squares[r] = I::zero();
  for (int64_t start = 0; start < dim; start += slice) {
    const int64_t columns = dim - start < slice ? dim - start : slice;
    pack_slice<I>(rows, packed, index * panel, start, columns, dim, factor, squares);
  }
  float largest = 0;
  for (int64_t r = 0; r < panel; ++r) largest = larger_or_nan(sum_of_lanes<I>(squares[r]), largest);
  packed.panel_norms[index] = largest;
}

template <class I>
void pack_rows(const ak_rows& rows, PackedRows& packed, int64_t dim, float factor, int threads) {
  select_rows<I>(rows, packed);
  constexpr int64_t panels_a_turn = 4;
  const int64_t panels = packed.padded / Blocking<I>::panel;
  parallel_for(threads, (panels + panels_a_turn - 1) / panels_a_turn, [&](int64_t turn) {
    const int64_t first = turn * panels_a_turn;
    const int64_t last = first + panels_a_turn < panels ? first + panels_a_turn : panels;
    for (int64_t index = first; index < last; ++index) pack_panel<I>(rows, packed, index, dim, factor);
  });
}

template <class I>
float largest_squared_norm(const PackedRows& packed) {
  float largest = 0;
  for (int64_t index = 0; index < packed.padded / Blocking<I>::panel; ++index) {
    largest = larger_or_nan(packed.panel_norms[index], largest);
  }
  return largest;
}

}  // namespace

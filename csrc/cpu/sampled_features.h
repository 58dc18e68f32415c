// sampled_features, forward and backward, for any instruction set I (vector_*.h).
//
// In every axis tap p of the fine map lies at p · (coarse − 1) / (fine − 1) of the coarse one, in exact
// arithmetic: between two cells, so that a tap is a sum of at most 2^axes cells. Cells of weight 0 are not
// touched. Maps have three axes here; in two dimensions the first has one cell and one tap.
//
// The backward pass cuts the map into slabs, each of some rows of one image and some channels. Pixels are
// sorted by the slab that their window starts in; a slab adds up its own pixels' and those of the slab before,
// in float32, and writes out what they touched. So every cell has its addends in the order of the index, and
// no two threads write to one place.
#pragma once

#include <cstring>

#include "kernels.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "pack.h"
#include "parallel.h"

namespace {

using action_kernels::FeaturesCall;

constexpr int64_t group_channels = 64;      // combined together; a multiple of all lanes
constexpr int64_t window_cells = 4;         // of an axis that three taps can touch
constexpr int64_t pixels_a_turn = 16;
constexpr int64_t slab_floats = 64 * 1024;  // about: a slab should stay in the second cache
constexpr int64_t flag_cells = 16;          // cells with one flag for "something was added here"

// Of one axis: the cell below each tap, the way from there to the next cell, and which taps exist.
struct AxisTaps {
  int64_t lower[3];
  float way[3];
  bool exists[3];
  int64_t first, last;  // cells that the taps touch
};

inline AxisTaps taps_of_axis(int64_t position, int64_t coarse, int64_t fine, int64_t taps) {
  AxisTaps axis;
  const int64_t steps = fine > 1 ? fine - 1 : 1;
  axis.first = coarse;
  axis.last = -1;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t place = position + tap - taps / 2;
    axis.exists[tap] = place >= 0 && place < fine;
    axis.lower[tap] = 0;
    axis.way[tap] = 0;
    if (!axis.exists[tap]) continue;
    const int64_t numerator = place * (coarse - 1);
    axis.lower[tap] = numerator / steps;
    axis.way[tap] = static_cast<float>(numerator % steps) / static_cast<float>(steps);
    const int64_t upper = axis.lower[tap] + (axis.way[tap] > 0);
    if (axis.lower[tap] < axis.first) axis.first = axis.lower[tap];
    if (upper > axis.last) axis.last = upper;
  }
  return axis;
}

// An asked-for pixel: its image, and its taps in each axis.
struct PixelTaps {
  int64_t image;
  AxisTaps axes[3];
};

inline int64_t taps_in_axis(const ak_neighbourhoods& n, int axis) { return axis == 0 && n.axes == 2 ? 1 : 3; }

inline int64_t taps_of(const ak_neighbourhoods& n) { return n.axes == 2 ? 9 : 27; }

// False for an absent pixel.
inline bool find_taps(const ak_neighbourhoods& n, int64_t flat, PixelTaps& pixel) {
  if (flat < 0 || flat >= n.batch * n.fine[0] * n.fine[1] * n.fine[2]) return false;
  for (int axis = 2; axis >= 0; --axis) {
    pixel.axes[axis] = taps_of_axis(flat % n.fine[axis], n.coarse[axis], n.fine[axis], taps_in_axis(n, axis));
    flat /= n.fine[axis];
  }
  pixel.image = flat;
  return true;
}

// The cells of one tap, as offsets, and their weights.
struct Corners {
  int64_t offsets[8];
  float weights[8];
  int count;
};

// Offsets count from the cell `origin`, in steps of `strides`.
inline Corners corners_of_tap(const PixelTaps& pixel, int64_t t0, int64_t t1, int64_t t2, const int64_t* origin,
                              const int64_t* strides) {
  const int64_t taps[3] = {t0, t1, t2};
  Corners corners;
  corners.offsets[0] = 0;
  corners.weights[0] = 1;
  corners.count = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const AxisTaps& a = pixel.axes[axis];
    const int64_t lower = (a.lower[taps[axis]] - origin[axis]) * strides[axis];
    const float way = a.way[taps[axis]];
    for (int c = 0; c < corners.count; ++c) corners.offsets[c] += lower;
    if (way == 0) continue;
    for (int c = 0; c < corners.count; ++c) {
      corners.offsets[corners.count + c] = corners.offsets[c] + strides[axis];
      corners.weights[corners.count + c] = corners.weights[c] * way;
      corners.weights[c] *= 1 - way;
    }
    corners.count *= 2;
  }
  return corners;
}

inline bool tap_exists(const PixelTaps& pixel, int64_t t0, int64_t t1, int64_t t2) {
  return pixel.axes[0].exists[t0] && pixel.axes[1].exists[t1] && pixel.axes[2].exists[t2];
}

// use(tap, t0, t1, t2) for all taps, in the order of a flattened convolution kernel.
template <class Use>
AK_INLINE void for_each_tap(const ak_neighbourhoods& n, const Use& use) {
  const int64_t planes = taps_in_axis(n, 0);
  for (int64_t t0 = 0; t0 < planes; ++t0)
    for (int64_t t1 = 0; t1 < 3; ++t1)
      for (int64_t t2 = 0; t2 < 3; ++t2) use((t0 * 3 + t1) * 3 + t2, t0, t1, t2);
}

// ------------------------------------------------------------------------------------------ forward

// out[c] = Σ weight · cell[c] for `channels` channels.
template <class I>
void combine(const float* cells, const Corners& corners, int64_t channels, float* out) {
  const int64_t whole = channels / I::lanes * I::lanes;
  for (int64_t c = 0; c < whole; c += I::lanes) {
    typename I::Vec sum = I::multiply(I::set(corners.weights[0]), I::load(cells + corners.offsets[0] + c));
    for (int k = 1; k < corners.count; ++k)
      sum = I::fma(I::set(corners.weights[k]), I::load(cells + corners.offsets[k] + c), sum);
    I::store(out + c, sum);
  }
  for (int64_t c = whole; c < channels; ++c) {
    float sum = 0;
    for (int k = 0; k < corners.count; ++k) sum += corners.weights[k] * cells[corners.offsets[k] + c];
    out[c] = sum;
  }
}

// Some channels of the cells that a pixel's taps touch, as float32, the channels of a cell together.
inline void load_window(const FeaturesCall& call, const PixelTaps& pixel, int64_t channel, int64_t channels,
                        float* window) {
  const int64_t* strides = call.strides;
  const AxisTaps* axes = pixel.axes;
  const int64_t width = axes[2].last - axes[2].first + 1;
  for (int64_t i = axes[0].first; i <= axes[0].last; ++i)
    for (int64_t j = axes[1].first; j <= axes[1].last; ++j) {
      float* cells = window + ((i - axes[0].first) * window_cells + j - axes[1].first) * window_cells * group_channels;
      const int64_t start = pixel.image * strides[0] + channel * strides[1] + i * strides[2] + j * strides[3] +
                            axes[2].first * strides[4];
      if (strides[1] == 1) {
        for (int64_t k = 0; k < width; ++k)
          load_floats(call.features, call.what.dtype, start + k * strides[4], channels, cells + k * group_channels);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < width; ++k)
          cells[k * group_channels + c] = load_float(call.features, call.what.dtype, start + c * strides[1] + k * strides[4]);
    }
}

// The neighbourhood of one pixel, by groups of channels.
template <class I>
void sample_pixel(const FeaturesCall& call, int64_t pixel_number, const PixelTaps& pixel) {
  const ak_neighbourhoods& n = call.what;
  const bool in_place = n.dtype == AK_FLOAT32 && call.strides[1] == 1;
  const int64_t window_strides[3] = {window_cells * window_cells * group_channels, window_cells * group_channels,
                                     group_channels};
  const int64_t window_origin[3] = {pixel.axes[0].first, pixel.axes[1].first, pixel.axes[2].first};
  const int64_t map_origin[3] = {0, 0, 0};
  float window[window_cells * window_cells * window_cells * group_channels];
  float line[group_channels];
  for (int64_t channel = 0; channel < n.channels; channel += group_channels) {
    const int64_t channels = n.channels - channel < group_channels ? n.channels - channel : group_channels;
    const float* cells = window;
    if (in_place) {
      cells = static_cast<const float*>(call.features) + pixel.image * call.strides[0] + channel;
    } else {
      load_window(call, pixel, channel, channels, window);
    }
    for_each_tap(n, [&](int64_t tap, int64_t t0, int64_t t1, int64_t t2) {
      const int64_t place = (pixel_number * taps_of(n) + tap) * n.channels + channel;
      if (!tap_exists(pixel, t0, t1, t2)) {
        std::memset(line, 0, sizeof line);
      } else {
        const Corners corners = corners_of_tap(pixel, t0, t1, t2, in_place ? map_origin : window_origin,
                                               in_place ? call.strides + 2 : window_strides);
        combine<I>(cells, corners, channels, line);
      }
      store_floats(line, channels, call.out, n.dtype, place);
    });
  }
}

template <class I>
void features_forward(const FeaturesCall& call) {
  const ak_neighbourhoods& n = call.what;
  const int64_t row = taps_of(n) * n.channels * element_size(n.dtype);
  parallel_for(call.threads, (n.count + pixels_a_turn - 1) / pixels_a_turn, [&](int64_t turn) {
    const int64_t last = n.count < (turn + 1) * pixels_a_turn ? n.count : (turn + 1) * pixels_a_turn;
    for (int64_t p = turn * pixels_a_turn; p < last; ++p) {
      PixelTaps pixel;
      if (find_taps(n, n.index[p], pixel)) {
        sample_pixel<I>(call, p, pixel);
      } else {
        std::memset(static_cast<char*>(call.out) + p * row, 0, static_cast<size_t>(row));
      }
    }
  });
}

// ------------------------------------------------------------------------------------------ backward

// How the map is cut into slabs. Rows are those of the first axis that is longer than a cell.
struct Slabs {
  explicit Slabs(const ak_neighbourhoods& n)
      : row_axis(n.coarse[0] > 1 ? 0 : 1),
        rows(n.coarse[row_axis]),
        row_cells(row_axis == 0 ? n.coarse[1] * n.coarse[2] : n.coarse[2]),
        groups((n.channels + group_channels - 1) / group_channels),
        width(n.channels < group_channels ? n.channels : group_channels),
        slab_rows(rows_that_fit()),
        per_image((rows + slab_rows - 1) / slab_rows),
        count(n.batch * per_image) {}

  // At least as many rows as a window, so that it reaches into one other slab at most.
  int64_t rows_that_fit() const {
    const int64_t fit = slab_floats / (row_cells * width);
    return fit < window_cells ? window_cells : fit < rows ? fit : rows;
  }

  int64_t slab_of(const PixelTaps& pixel) const {
    return pixel.image * per_image + pixel.axes[row_axis].first / slab_rows;
  }

  int64_t cells() const { return slab_rows * row_cells; }
  int64_t flags() const { return (cells() + flag_cells - 1) / flag_cells; }

  const int row_axis;
  const int64_t rows;       // of an image
  const int64_t row_cells;
  const int64_t groups;     // of channels
  const int64_t width;      // channels of a group
  const int64_t slab_rows;
  const int64_t per_image;
  const int64_t count;      // of all images
};

// What the backward pass keeps: pixels sorted by slab, and for each thread a slab's sums, zero between slabs.
struct FeaturesWork {
  FeaturesWork(const FeaturesCall& call, const Slabs& slabs) : arena(call.workspace) {
    starts = arena.take<int64_t>(slabs.count + 1);
    order = arena.take<int64_t>(call.what.count);
    sums = arena.take<float>(call.threads * slab_stride(slabs));
    flags = arena.take<uint8_t>(call.threads * flag_stride(slabs));
  }

  static int64_t slab_stride(const Slabs& slabs) { return (slabs.cells() * slabs.width + 15) / 16 * 16; }
  static int64_t flag_stride(const Slabs& slabs) { return (slabs.flags() + 63) / 64 * 64; }

  Arena arena;
  int64_t* starts;  // (slabs + 1): where in `order` each slab's pixels begin
  int64_t* order;
  float* sums;
  uint8_t* flags;
};

inline int64_t features_workspace(const FeaturesCall& call) {
  FeaturesCall counting = call;
  counting.workspace = nullptr;
  return FeaturesWork(counting, Slabs(call.what)).arena.bytes();
}

// A counting sort, stable: pixels of a slab stay in their order. Absent ones are left out.
inline void sort_pixels(const FeaturesCall& call, const Slabs& slabs, const FeaturesWork& work) {
  const ak_neighbourhoods& n = call.what;
  PixelTaps pixel;
  for (int64_t slab = 0; slab <= slabs.count; ++slab) work.starts[slab] = 0;
  for (int64_t p = 0; p < n.count; ++p) {
    if (find_taps(n, n.index[p], pixel)) ++work.starts[slabs.slab_of(pixel)];
  }
  int64_t before = 0;
  for (int64_t slab = 0; slab <= slabs.count; ++slab) {
    before += work.starts[slab];
    work.starts[slab] = before;  // where the slab's pixels end; filled from there backwards
  }
  for (int64_t p = n.count - 1; p >= 0; --p) {
    if (find_taps(n, n.index[p], pixel)) work.order[--work.starts[slabs.slab_of(pixel)]] = p;
  }
}

// The slab that a task works on.
struct Slab {
  int64_t image, first_row, rows;
  int64_t channel, channels;
  float* sums;  // [cell][channels]
  uint8_t* flags;
};

// Adds one pixel's gradient to the cells that lie in the slab.
template <class I>
void add_pixel(const FeaturesCall& call, const Slabs& slabs, const Slab& slab, int64_t pixel_number,
               const PixelTaps& pixel) {
  const ak_neighbourhoods& n = call.what;
  int64_t strides[3] = {n.coarse[1] * n.coarse[2], n.coarse[2], 1};  // in cells
  int64_t origin[3] = {0, 0, 0};
  origin[slabs.row_axis] = slab.first_row;
  const int64_t cells = slab.rows * slabs.row_cells;
  float line[group_channels];
  for_each_tap(n, [&](int64_t tap, int64_t t0, int64_t t1, int64_t t2) {
    if (!tap_exists(pixel, t0, t1, t2)) return;
    const Corners corners = corners_of_tap(pixel, t0, t1, t2, origin, strides);
    bool is_loaded = false;
    for (int k = 0; k < corners.count; ++k) {
      const int64_t cell = corners.offsets[k];  // outside of the slab's rows it is outside of this range
      if (cell < 0 || cell >= cells) continue;
      if (!is_loaded) {
        const int64_t place = (pixel_number * taps_of(n) + tap) * n.channels + slab.channel;
        load_floats(call.grad, n.dtype, place, slab.channels, line);
        is_loaded = true;
      }
      float* sums = slab.sums + cell * slab.channels;
      const typename I::Vec weight = I::set(corners.weights[k]);
      const int64_t whole = slab.channels / I::lanes * I::lanes;
      for (int64_t c = 0; c < whole; c += I::lanes)
        I::store(sums + c, I::fma(weight, I::load(line + c), I::load(sums + c)));
      for (int64_t c = whole; c < slab.channels; ++c) sums[c] += corners.weights[k] * line[c];
      slab.flags[cell / flag_cells] = 1;
    }
  });
}

// Clears the slab's part of the gradient: cells lie together, or channels do.
inline void clear_gradient(const FeaturesCall& call, const Slabs& slabs, const Slab& slab) {
  const int64_t image_cells = slabs.rows * slabs.row_cells, first = slab.first_row * slabs.row_cells;
  const int64_t cells = slab.rows * slabs.row_cells, bytes = element_size(call.what.dtype);
  char* gradient = static_cast<char*>(call.gradient) + slab.image * image_cells * call.what.channels * bytes;
  if (!call.channels_last) {
    for (int64_t c = slab.channel; c < slab.channel + slab.channels; ++c)
      std::memset(gradient + (c * image_cells + first) * bytes, 0, static_cast<size_t>(cells * bytes));
  } else if (slab.channels == call.what.channels) {
    std::memset(gradient + first * slab.channels * bytes, 0, static_cast<size_t>(cells * slab.channels * bytes));
  } else {
    for (int64_t cell = first; cell < first + cells; ++cell)
      std::memset(gradient + (cell * call.what.channels + slab.channel) * bytes, 0,
                  static_cast<size_t>(slab.channels * bytes));
  }
}

// Writes the sums of some cells out, and clears them.
inline void write_cells(const FeaturesCall& call, const Slabs& slabs, const Slab& slab, int64_t cell, int64_t cells) {
  const int64_t image_cells = slabs.rows * slabs.row_cells, map_cell = slab.first_row * slabs.row_cells + cell;
  const int64_t image = slab.image * image_cells * call.what.channels;
  float* sums = slab.sums + cell * slab.channels;
  if (call.channels_last) {
    for (int64_t k = 0; k < cells; ++k)
      store_floats(sums + k * slab.channels, slab.channels, call.gradient, call.what.dtype,
                   image + (map_cell + k) * call.what.channels + slab.channel);
  } else {
    float line[flag_cells];
    for (int64_t c = 0; c < slab.channels; ++c) {
      for (int64_t k = 0; k < cells; ++k) line[k] = sums[k * slab.channels + c];
      store_floats(line, cells, call.gradient, call.what.dtype, image + (slab.channel + c) * image_cells + map_cell);
    }
  }
  std::memset(sums, 0, static_cast<size_t>(cells * slab.channels) * sizeof(float));
}

template <class I>
void fill_slab(const FeaturesCall& call, const Slabs& slabs, const FeaturesWork& work, int64_t number,
               const Slab& slab) {
  clear_gradient(call, slabs, slab);
  const bool has_one_before = number % slabs.per_image > 0;
  int64_t own = work.starts[number], before = has_one_before ? work.starts[number - 1] : own;
  const int64_t own_end = work.starts[number + 1], before_end = own;
  while (own < own_end || before < before_end) {  // both ascend: together in the order of the index
    const bool is_own = before == before_end || (own < own_end && work.order[own] < work.order[before]);
    const int64_t p = work.order[is_own ? own++ : before++];
    PixelTaps pixel;
    find_taps(call.what, call.what.index[p], pixel);
    add_pixel<I>(call, slabs, slab, p, pixel);
  }
  const int64_t cells = slab.rows * slabs.row_cells;
  for (int64_t cell = 0; cell < cells; cell += flag_cells) {
    if (!slab.flags[cell / flag_cells]) continue;
    slab.flags[cell / flag_cells] = 0;
    write_cells(call, slabs, slab, cell, cells - cell < flag_cells ? cells - cell : flag_cells);
  }
}

template <class I>
void features_backward(const FeaturesCall& call) {
  const Slabs slabs(call.what);
  const FeaturesWork work(call, slabs);
  sort_pixels(call, slabs, work);
  WorkQueue queue(slabs.count * slabs.groups);
  const bool many = slabs.count * slabs.groups >= call.threads;
  parallel(many ? call.threads : static_cast<int>(slabs.count * slabs.groups), [&](int thread) {
    float* sums = work.sums + thread * FeaturesWork::slab_stride(slabs);
    uint8_t* flags = work.flags + thread * FeaturesWork::flag_stride(slabs);
    bool is_clear = false;
    for (int64_t task = queue.take(); task >= 0; task = queue.take()) {
      if (!is_clear) {
        std::memset(sums, 0, static_cast<size_t>(slabs.cells() * slabs.width) * sizeof(float));
        std::memset(flags, 0, static_cast<size_t>(slabs.flags()));
        is_clear = true;
      }
      const int64_t number = task / slabs.groups, channel = task % slabs.groups * group_channels;
      const int64_t row = number % slabs.per_image * slabs.slab_rows, left = call.what.channels - channel;
      const Slab slab = {number / slabs.per_image, row,
                         slabs.rows - row < slabs.slab_rows ? slabs.rows - row : slabs.slab_rows, channel,
                         left < group_channels ? left : group_channels, sums, flags};
      fill_slab<I>(call, slabs, work, number, slab);
    }
  });
}

}  // namespace

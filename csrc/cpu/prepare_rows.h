// prepare_rows: feature maps or rows → masked, normalised, cast rows, and back, for any instruction set I.
//
// Works on chunks of some pixels × some channels, pixel-major in float32; each pass reads the features
// where they lie, so nothing of the size of the map is allocated. The time is that of the memory.
#pragma once

#include <cmath>

#include "kernels.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "parallel.h"

namespace {

using action_kernels::PrepareCall;

constexpr int64_t chunk_pixels = 64;
constexpr int64_t chunk_channels = 16;
constexpr float minimum_norm = 1e-12f;
constexpr float largest_float = 3.402823466e38f;

struct Chunk {
  float values[chunk_pixels * chunk_channels];
  float* pixel(int64_t p) { return values + p * chunk_channels; }
};

// Consecutive pixels of one image, and how their rows are counted.
struct PixelRange {
  int64_t first_row;    // in (batch, pixels) order
  int64_t count;
  int64_t map_start;    // element of the first pixel's first channel
  int64_t channel_step; // elements between a pixel's channels
  int64_t pixel_step;   // elements between neighbouring pixels
};

inline int64_t ranges_a_batch(const ak_map& map) {
  const int64_t pixels = map.pixels == 1 ? map.batch : map.pixels;
  return (pixels + chunk_pixels - 1) / chunk_pixels;
}

inline int64_t range_count(const ak_map& map) { return ranges_a_batch(map) * (map.pixels == 1 ? 1 : map.batch); }

inline PixelRange range_of(const ak_map& map, int64_t index) {
  const int64_t image = index / ranges_a_batch(map);
  const int64_t first = index % ranges_a_batch(map) * chunk_pixels;
  const bool is_matrix = map.pixels == 1;
  const int64_t pixels = is_matrix ? map.batch : map.pixels;
  const int64_t count = pixels - first < chunk_pixels ? pixels - first : chunk_pixels;
  if (is_matrix) return {first, count, first * map.dim, 1, map.dim};
  return {image * pixels + first, count, image * map.dim * pixels + first, pixels, 1};
}

// A chunk of a map or matrix; channels beyond `channels` become 0.
inline void load_chunk(const void* data, int dtype, const PixelRange& range, int64_t channel, int64_t channels,
                       Chunk& chunk) {
  const bool whole = channels == chunk_channels;  // a count that the compiler knows: no call for a few bytes
  if (range.channel_step == 1 && whole) {
    for (int64_t p = 0; p < range.count; ++p) {
      load_floats(data, dtype, range.map_start + p * range.pixel_step + channel, chunk_channels, chunk.pixel(p));
    }
    return;
  }
  for (int64_t p = 0; p < range.count && !whole; ++p) {
    for (int64_t c = channels; c < chunk_channels; ++c) chunk.pixel(p)[c] = 0;
  }
  if (range.channel_step == 1) {
    for (int64_t p = 0; p < range.count; ++p) {
      load_floats(data, dtype, range.map_start + p * range.pixel_step + channel, channels, chunk.pixel(p));
    }
    return;
  }
  float line[chunk_pixels];
  for (int64_t c = 0; c < channels; ++c) {
    load_floats(data, dtype, range.map_start + (channel + c) * range.channel_step, range.count, line);
    for (int64_t p = 0; p < range.count; ++p) chunk.pixel(p)[c] = line[p];
  }
}

inline void store_chunk(Chunk& chunk, const PixelRange& range, int64_t channel, int64_t channels, void* data,
                        int dtype) {
  if (range.channel_step == 1 && channels == chunk_channels) {
    for (int64_t p = 0; p < range.count; ++p) {
      store_floats(chunk.pixel(p), chunk_channels, data, dtype, range.map_start + p * range.pixel_step + channel);
    }
    return;
  }
  if (range.channel_step == 1) {
    for (int64_t p = 0; p < range.count; ++p) {
      store_floats(chunk.pixel(p), channels, data, dtype, range.map_start + p * range.pixel_step + channel);
    }
    return;
  }
  float line[chunk_pixels];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < range.count; ++p) line[p] = chunk.pixel(p)[c];
    store_floats(line, range.count, data, dtype, range.map_start + (channel + c) * range.channel_step);
  }
}

// The same pixels in a (batch · pixels, dim) matrix.
inline PixelRange as_rows(const PixelRange& range, int64_t dim) {
  return {range.first_row, range.count, range.first_row * dim, 1, dim};
}

inline int64_t channels_from(int64_t channel, int64_t dim) {
  return dim - channel < chunk_channels ? dim - channel : chunk_channels;
}

// sums[p] += Σ_c a[p, c] · b[p, c], lane by lane.
template <class I>
void add_dots(Chunk& a, Chunk& b, int64_t pixels, typename I::Vec* sums) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < chunk_channels; c += I::lanes) {
      sums[p] = I::fma(I::load(a.pixel(p) + c), I::load(b.pixel(p) + c), sums[p]);
    }
  }
}

// A power of two that brings the squares of any row's values into float32's range, and its rows' own.
constexpr float shrinking = 0x1p-100f;

// Of each pixel of a range: row = (x · shrink) · factor. `shrink` is 1, or `shrinking` where the squares
// of its values would overflow.
struct Factors {
  float shrink[chunk_pixels];
  float factor[chunk_pixels];
};

// squares[p] = Σ_c (x[p, c] · shrink[p])², lane by lane.
template <class I>
void add_squares(const PrepareCall& call, const PixelRange& range, const float* shrink, typename I::Vec* squares) {
  for (int64_t p = 0; p < range.count; ++p) squares[p] = I::zero();
  Chunk chunk;
  for (int64_t channel = 0; channel < call.map.dim; channel += chunk_channels) {
    load_chunk(call.map.data, call.map.dtype, range, channel, channels_from(channel, call.map.dim), chunk);
    if (shrink) {
      for (int64_t p = 0; p < range.count; ++p)
        for (int64_t c = 0; c < chunk_channels; ++c) chunk.pixel(p)[c] *= shrink[p];
    }
    add_dots<I>(chunk, chunk, range.count, squares);
  }
}

// 1 / norm, 0 for a norm that is taken for 0, NaN for a row that holds NaN or an infinity.
inline float inverse_norm(float square, float shrink) {
  const float norm = std::sqrt(square);
  if (shrink == 1 && norm < minimum_norm) return 0;
  return norm <= largest_float ? 1 / norm : NAN;
}

template <class I>
void find_factors(const PrepareCall& call, const PixelRange& range, Factors& found) {
  typename I::Vec squares[chunk_pixels];
  bool overflows = false;
  for (int64_t p = 0; p < range.count; ++p) found.shrink[p] = found.factor[p] = 1;
  if (call.normalize) {
    add_squares<I>(call, range, nullptr, squares);
    for (int64_t p = 0; p < range.count; ++p) {
      const bool finite = sum_of_lanes<I>(squares[p]) <= largest_float;
      if (!finite) found.shrink[p] = shrinking;
      overflows = overflows || !finite;
    }
    if (overflows) add_squares<I>(call, range, found.shrink, squares);
    for (int64_t p = 0; p < range.count; ++p) {
      found.factor[p] = inverse_norm(sum_of_lanes<I>(squares[p]), found.shrink[p]);
    }
  }
  for (int64_t p = 0; p < range.count; ++p) {
    const int64_t row = range.first_row + p;
    const bool left_out = call.mask && !call.mask[row];
    call.factors[row] = left_out ? 0.0f : found.shrink[p] * found.factor[p];
  }
}

inline void write_rows(const PrepareCall& call, const PixelRange& range, const Factors& found) {
  Chunk chunk;
  for (int64_t channel = 0; channel < call.map.dim; channel += chunk_channels) {
    const int64_t channels = channels_from(channel, call.map.dim);
    load_chunk(call.map.data, call.map.dtype, range, channel, channels, chunk);
    for (int64_t p = 0; p < range.count; ++p) {
      const int64_t row = range.first_row + p;
      const bool left_out = call.mask && !call.mask[row];
      const float shrink = found.shrink[p], factor = found.factor[p];
      float* values = chunk.pixel(p);
      for (int64_t c = 0; c < chunk_channels; ++c) values[c] = left_out ? 0.0f : values[c] * shrink * factor;
    }
    store_chunk(chunk, as_rows(range, call.map.dim), channel, channels, call.rows, call.rows_dtype);
  }
}

template <class I>
void prepare_forward(const PrepareCall& call) {
  parallel_for(call.threads, range_count(call.map), [&](int64_t index) {
    const PixelRange range = range_of(call.map, index);
    Factors found;
    find_factors<I>(call, range, found);
    write_rows(call, range, found);
  });
}

// Rows r = f · x of a chunk, before a product with them: x itself may be too large for one.
inline void load_rows(const PrepareCall& call, const PixelRange& range, int64_t channel, int64_t channels, Chunk& r) {
  load_chunk(call.map.data, call.map.dtype, range, channel, channels, r);
  for (int64_t p = 0; p < range.count; ++p) {
    const float factor = call.saved_factors[range.first_row + p];
    for (int64_t c = 0; c < chunk_channels; ++c) r.pixel(p)[c] *= factor;
  }
}

// pulls[p] = r · g, the part of g along the row, so that the gradient is f (g − r · pull).
template <class I>
void find_pulls(const PrepareCall& call, const PixelRange& range, float* pulls) {
  typename I::Vec dots[chunk_pixels];
  for (int64_t p = 0; p < range.count; ++p) dots[p] = I::zero();
  Chunk r, g;
  for (int64_t channel = 0; call.normalize && channel < call.map.dim; channel += chunk_channels) {
    const int64_t channels = channels_from(channel, call.map.dim);
    load_rows(call, range, channel, channels, r);
    load_chunk(call.grad_rows, call.rows_dtype, as_rows(range, call.map.dim), channel, channels, g);
    add_dots<I>(r, g, range.count, dots);
  }
  for (int64_t p = 0; p < range.count; ++p) pulls[p] = sum_of_lanes<I>(dots[p]);
}

inline void write_gradient(const PrepareCall& call, const PixelRange& range, const float* pulls) {
  Chunk r, g;
  for (int64_t channel = 0; channel < call.map.dim; channel += chunk_channels) {
    const int64_t channels = channels_from(channel, call.map.dim);
    if (call.normalize) load_rows(call, range, channel, channels, r);
    load_chunk(call.grad_rows, call.rows_dtype, as_rows(range, call.map.dim), channel, channels, g);
    for (int64_t p = 0; p < range.count; ++p) {
      const float factor = call.saved_factors[range.first_row + p];
      for (int64_t c = 0; c < chunk_channels; ++c) {
        const float along = call.normalize ? r.pixel(p)[c] * pulls[p] : 0.0f;
        g.pixel(p)[c] = factor == 0 ? 0.0f : factor * (g.pixel(p)[c] - along);
      }
    }
    store_chunk(g, range, channel, channels, call.grad_map, call.map.dtype);
  }
}

template <class I>
void prepare_backward(const PrepareCall& call) {
  parallel_for(call.threads, range_count(call.map), [&](int64_t index) {
    const PixelRange range = range_of(call.map, index);
    float pulls[chunk_pixels];
    find_pulls<I>(call, range, pulls);
    write_gradient(call, range, pulls);
  });
}

}  // namespace

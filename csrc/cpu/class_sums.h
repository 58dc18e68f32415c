// class_sums: for every class and tap, the sum of what the tap reads at the pixels of the class, for any
// instruction set I (vector_*.h).
//
// Upsampling is linear, so the sum over pixels of a class is one over the cells of the coarse map: each cell
// times the sum of the weights with which that tap of those pixels reads it. The weights factor by axis: a line
// of pixels gives the weights of a line of cells (for every class and tap of the last axis), lines of a plane add
// up to a plane, planes to a block; what is left is a product (classes · taps, cells) · (cells, channels). A map
// as fine as the labels needs no weights: each cell is added to the sums of its neighbours' classes.
//
// A task is a block of rows of one image and has sums of its own; they are added up in double precision, in the
// order of the tasks.
#pragma once

#include <cstring>

#include "kernels.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "pack.h"
#include "parallel.h"

namespace {

using action_kernels::ClassSumsCall;

constexpr int64_t sums_group = 64;          // channels at a time; a multiple of all lanes
constexpr int64_t weight_floats = 1 << 17;  // of a task, about: they should stay in the second cache
constexpr int64_t exact_cells = 4096;       // of a task where no weights are needed: few roundings to a sum

inline bool is_exact(const ak_class_maps& m) {
  return m.coarse[0] == m.fine[0] && m.coarse[1] == m.fine[1] && m.coarse[2] == m.fine[2];
}

// Sizes that follow from a call. The block axis is the first one, in two dimensions the second.
struct SumsShape {
  explicit SumsShape(const ak_class_maps& m)
      : axis(m.axes == 2 ? 1 : 0),
        lines(m.axes == 2 ? 3 : 9),
        columns(m.classes * 3),
        groups((m.channels + sums_group - 1) / sums_group),
        line_weights(m.coarse[2] * columns),
        plane_weights(m.coarse[1] * 3 * line_weights),
        row_weights(m.axes == 2 ? 3 * line_weights : 3 * plane_weights),
        row_cells(m.axes == 2 ? m.coarse[2] : m.coarse[1] * m.coarse[2]),
        block_rows(rows_that_fit(m)),
        blocks((m.coarse[axis] + block_rows - 1) / block_rows),
        tasks(m.batch * blocks),
        padded_channels(groups * sums_group),
        sums(lines * columns * padded_channels) {}

  int64_t rows_that_fit(const ak_class_maps& m) const {
    const int64_t fit = is_exact(m) ? exact_cells / row_cells : weight_floats / row_weights;
    return fit < 1 ? 1 : fit < m.coarse[axis] ? fit : m.coarse[axis];
  }

  const int axis;
  const int64_t lines;          // taps of all axes but the last
  const int64_t columns;        // classes · taps of the last axis
  const int64_t groups;         // of channels
  const int64_t line_weights;   // [cell][class][tap]
  const int64_t plane_weights;  // [row][tap] of lines
  const int64_t row_weights;    // of a row of the block: [tap] of lines or planes
  const int64_t row_cells;
  const int64_t block_rows;
  const int64_t blocks;         // of an image
  const int64_t tasks;
  const int64_t padded_channels;
  const int64_t sums;           // of a task: [line][class][tap][padded channel]
};

// Where a fine position reads a coarse axis: the cell below it, and the way to the next.
struct Reading {
  int64_t lower;
  float way;
};

struct SumsScratch {
  float* line;     // line_weights
  float* plane;    // plane_weights, in three dimensions
  float* block;    // block_rows · row_weights, and a few beyond that may be read
  float* cells;    // a line of cells, [cell][sums_group]
  float* groups;   // exact: [line][tap][class, or none][sums_group]
  float* alike;    // exact: [class, or none][sums_group], of cells that one class surrounds
  int32_t* labels; // exact: lines of labels with one more at either end
  int32_t* shared; // exact: what all lines hold at a place, or −1
};

struct SumsWork {
  SumsWork(const ClassSumsCall& call, const SumsShape& shape) : arena(call.workspace) {
    for (int axis = 0; axis < 3; ++axis) readings[axis] = arena.take<Reading>(call.what.fine[axis]);
    sums = arena.take<float>(shape.tasks * shape.sums);
    start = arena;
  }

  // What a thread needs to itself, behind that of the threads before it.
  SumsScratch scratch(const ClassSumsCall& call, const SumsShape& shape, int thread) const {
    Arena own = start;
    SumsScratch taken;
    for (int t = 0; t <= thread; ++t) taken = take(call, shape, own);
    return taken;
  }

  static SumsScratch take(const ClassSumsCall& call, const SumsShape& shape, Arena& arena) {
    const ak_class_maps& m = call.what;
    SumsScratch scratch = {};
    scratch.cells = arena.take<float>(m.coarse[2] * sums_group);
    if (is_exact(m)) {
      scratch.groups = arena.take<float>(shape.lines * 3 * (m.classes + 1) * sums_group);
      scratch.alike = arena.take<float>((m.classes + 1) * sums_group);
      scratch.labels = arena.take<int32_t>(shape.lines * (m.fine[2] + 2));
      scratch.shared = arena.take<int32_t>(m.fine[2] + 2);
    } else {
      scratch.line = arena.take<float>(shape.line_weights);
      scratch.plane = m.axes == 3 ? arena.take<float>(shape.plane_weights) : nullptr;
      scratch.block = arena.take<float>(shape.block_rows * shape.row_weights + sums_group);
    }
    return scratch;
  }

  Arena arena, start{nullptr};
  Reading* readings[3];
  float* sums;
};

inline int64_t class_sums_workspace(const ClassSumsCall& call) {
  ClassSumsCall counting = call;
  counting.workspace = nullptr;
  const SumsShape shape(call.what);
  const SumsWork work(counting, shape);
  Arena arena = work.start;
  for (int thread = 0; thread < call.threads; ++thread) SumsWork::take(counting, shape, arena);
  return arena.bytes();
}

inline void set_readings(const ak_class_maps& m, const SumsWork& work) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t steps = m.fine[axis] > 1 ? m.fine[axis] - 1 : 1;
    for (int64_t p = 0; p < m.fine[axis]; ++p) {
      const int64_t numerator = p * (m.coarse[axis] - 1);
      work.readings[axis][p] = {numerator / steps,
                                static_cast<float>(numerator % steps) / static_cast<float>(steps)};
    }
  }
}

// Some channels of a line of cells as float32, [cell][sums_group], zero beyond them up to `width`.
inline void load_cells(const ClassSumsCall& call, int64_t start, int64_t channel, int64_t channels, int64_t width,
                       float* cells) {
  const int64_t length = call.what.coarse[2], step = call.strides[4], channel_step = call.strides[1];
  start += channel * channel_step;
  for (int64_t k = 0; channels < width && k < length; ++k)
    for (int64_t c = channels; c < width; ++c) cells[k * sums_group + c] = 0;
  if (channel_step == 1) {
    for (int64_t k = 0; k < length; ++k)
      load_floats(call.features, call.what.dtype, start + k * step, channels, cells + k * sums_group);
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < length; ++k)
      cells[k * sums_group + c] = load_float(call.features, call.what.dtype, start + c * channel_step + k * step);
}

// ------------------------------------------------------------------------------------------ coarse maps

// to += factor · from.
template <class I>
void add_scaled(float factor, const float* from, int64_t count, float* to) {
  const int64_t whole = count / I::lanes * I::lanes;
  for (int64_t i = 0; i < whole; i += I::lanes)
    I::store(to + i, I::fma(I::set(factor), I::load(from + i), I::load(to + i)));
  for (int64_t i = whole; i < count; ++i) to[i] += factor * from[i];
}

// Weights of a line of cells from a line of labels.
inline void weigh_line(const ak_class_maps& m, const int64_t* labels, const Reading* readings, const SumsShape& shape,
                       float* line) {
  std::memset(line, 0, static_cast<size_t>(shape.line_weights) * sizeof(float));
  for (int64_t x = 0; x < m.fine[2]; ++x) {
    const int64_t label = labels[x];
    if (label < 0 || label >= m.classes) continue;
    for (int64_t tap = 0; tap < 3; ++tap) {
      const int64_t reads = x + tap - 1;
      if (reads < 0 || reads >= m.fine[2]) continue;
      float* cell = line + readings[reads].lower * shape.columns + label * 3 + tap;
      cell[0] += 1 - readings[reads].way;
      if (readings[reads].way > 0) cell[shape.columns] += readings[reads].way;
    }
  }
}

// The fine positions that some tap reads cells first … last − 1 from, and one more at either end.
struct Range {
  int64_t first, last;
};

inline Range positions_of(const Reading* readings, int64_t fine, int64_t first, int64_t last) {
  int64_t from = 0, to = fine;
  while (from < fine && readings[from].lower + (readings[from].way > 0) < first) ++from;
  while (to > from && readings[to - 1].lower >= last) --to;
  return {from > 0 ? from - 1 : 0, to < fine ? to + 1 : fine};
}

// use(tap, row, weight) for the rows first … last − 1 of a coarse axis that a fine position is read from.
template <class Use>
AK_INLINE void for_each_row(const Reading* readings, int64_t fine, int64_t position, int64_t first, int64_t last,
                            const Use& use) {
  for (int64_t tap = 0; tap < 3; ++tap) {
    const int64_t reads = position + tap - 1;
    if (reads < 0 || reads >= fine) continue;
    const Reading reading = readings[reads];
    if (reading.lower >= first && reading.lower < last) use(tap, reading.lower - first, 1 - reading.way);
    if (reading.way > 0 && reading.lower + 1 >= first && reading.lower + 1 < last)
      use(tap, reading.lower + 1 - first, reading.way);
  }
}

// rows[row][tap] += weights of the lines of one plane of labels, for the rows first … last − 1.
template <class I>
void weigh_plane(const ak_class_maps& m, const SumsShape& shape, const SumsWork& work, const int64_t* labels,
                 int64_t first, int64_t last, float* line, float* rows) {
  const Range range = positions_of(work.readings[1], m.fine[1], first, last);
  const size_t bytes = static_cast<size_t>(m.fine[2]) * sizeof(int64_t);
  for (int64_t y = range.first; y < range.last; ++y) {
    const int64_t* own = labels + y * m.fine[2];
    const bool is_alike = y > range.first && std::memcmp(own, own - m.fine[2], bytes) == 0;  // most are background
    if (!is_alike) weigh_line(m, own, work.readings[2], shape, line);
    for_each_row(work.readings[1], m.fine[1], y, first, last, [&](int64_t tap, int64_t row, float weight) {
      add_scaled<I>(weight, line, shape.line_weights, rows + (row * 3 + tap) * shape.line_weights);
    });
  }
}

template <class I>
void weigh_block(const ak_class_maps& m, const SumsShape& shape, const SumsWork& work, int64_t image, int64_t first,
                 int64_t last, const SumsScratch& scratch) {
  const int64_t* labels = m.labels + image * m.fine[0] * m.fine[1] * m.fine[2];
  std::memset(scratch.block, 0, static_cast<size_t>((last - first) * shape.row_weights) * sizeof(float));
  if (m.axes == 2) {
    weigh_plane<I>(m, shape, work, labels, first, last, scratch.line, scratch.block);
    return;
  }
  const Range range = positions_of(work.readings[0], m.fine[0], first, last);
  for (int64_t z = range.first; z < range.last; ++z) {
    std::memset(scratch.plane, 0, static_cast<size_t>(shape.plane_weights) * sizeof(float));
    weigh_plane<I>(m, shape, work, labels + z * m.fine[1] * m.fine[2], 0, m.coarse[1], scratch.line, scratch.plane);
    for_each_row(work.readings[0], m.fine[0], z, first, last, [&](int64_t tap, int64_t row, float weight) {
      add_scaled<I>(weight, scratch.plane, shape.plane_weights,
                    scratch.block + (row * 3 + tap) * shape.plane_weights);
    });
  }
}

// sums[r, :] += Σ_k weights[k, r] · cells[k, :] for up to product_rows rows and Vectors vectors of channels.
template <class I, int Vectors>
AK_NOINLINE void add_line_product(const float* weights, int64_t columns, int64_t rows, const float* cells,
                                  int64_t count, float* sums, int64_t sums_stride) {
  typename I::Vec total[I::product_rows][Vectors];
  AK_UNROLL for (int r = 0; r < I::product_rows; ++r)
    AK_UNROLL for (int v = 0; v < Vectors; ++v) total[r][v] = I::zero();
  for (int64_t k = 0; k < count; ++k) {
    typename I::Vec cell[Vectors];
    AK_UNROLL for (int v = 0; v < Vectors; ++v) cell[v] = I::load(cells + k * sums_group + v * I::lanes);
    AK_UNROLL for (int r = 0; r < I::product_rows; ++r) {
      const typename I::Vec weight = I::broadcast(weights + k * columns + r);  // beyond `rows`: not used
      AK_UNROLL for (int v = 0; v < Vectors; ++v) total[r][v] = I::fma(weight, cell[v], total[r][v]);
    }
  }
  AK_UNROLL for (int r = 0; r < I::product_rows; ++r) {
    if (r == rows) return;
    AK_UNROLL for (int v = 0; v < Vectors; ++v) {
      float* place = sums + r * sums_stride + v * I::lanes;
      I::store(place, I::add(I::load(place), total[r][v]));
    }
  }
}

// All channels of a group, Vectors at a time; the last ones may need fewer.
template <class I, int Vectors = I::product_vectors>
void add_line(const float* weights, const SumsShape& shape, const float* cells, int64_t count, int64_t width,
              float* sums, int64_t channel = 0) {
  for (; width - channel > (Vectors - 1) * I::lanes; channel += Vectors * I::lanes)
    for (int64_t r = 0; r < shape.columns; r += I::product_rows) {
      const int64_t left = shape.columns - r, rows = left < I::product_rows ? left : I::product_rows;
      add_line_product<I, Vectors>(weights + r, shape.columns, rows, cells + channel, count,
                                   sums + r * shape.padded_channels + channel, shape.padded_channels);
    }
  if constexpr (Vectors > 1) {
    if (channel < width) add_line<I, Vectors - 1>(weights, shape, cells, count, width, sums, channel);
  }
}

// Adds the block's cells, weighted, to the task's sums.
template <class I>
void add_block(const ClassSumsCall& call, const SumsShape& shape, int64_t image, int64_t first, int64_t last,
               const SumsScratch& scratch, float* sums) {
  const ak_class_maps& m = call.what;
  const int64_t inner = m.axes == 2 ? 1 : m.coarse[1];
  for (int64_t row = first; row < last; ++row)
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t start = image * call.strides[0] + row * call.strides[2 + shape.axis] + (m.axes == 2 ? 0 : i * call.strides[3]);
      const float* row_weights = scratch.block + (row - first) * shape.row_weights;
      for (int64_t channel = 0; channel < m.channels; channel += sums_group) {
        const int64_t channels = m.channels - channel < sums_group ? m.channels - channel : sums_group;
        const int64_t width = whole_vectors<I>(channels);
        load_cells(call, start, channel, channels, width, scratch.cells);
        for (int64_t line = 0; line < shape.lines; ++line) {
          const float* weights = m.axes == 2 ? row_weights + line * shape.line_weights
                                             : row_weights + line / 3 * shape.plane_weights +
                                                   (i * 3 + line % 3) * shape.line_weights;
          add_line<I>(weights, shape, scratch.cells, m.coarse[2], width,
                      sums + line * shape.columns * shape.padded_channels + channel);
        }
      }
    }
}

// ------------------------------------------------------------------------------------------ maps as fine as the labels

// Classes of the pixels whose taps read a line of cells, a line of labels for each tap of the other axes; `classes`
// stands for none, which one more at either end is too. `is_next`: `lines` holds those of the line y − 1.
inline void load_label_lines(const ak_class_maps& m, const SumsShape& shape, int64_t image, int64_t z, int64_t y,
                             bool is_next, int32_t* lines) {
  const int32_t none = static_cast<int32_t>(m.classes);
  const int64_t length = m.fine[2] + 2;
  for (int64_t line = 0; line < shape.lines; ++line, lines += length) {
    if (is_next && line % 3 > 0) continue;
    if (is_next) std::memmove(lines + length, lines, static_cast<size_t>(2 * length) * sizeof(int32_t));
    const int64_t from_z = m.axes == 2 ? 0 : z + 1 - line / 3, from_y = y + 1 - line % 3;
    const bool exists = from_z >= 0 && from_z < m.fine[0] && from_y >= 0 && from_y < m.fine[1];
    const int64_t* labels = m.labels + ((image * m.fine[0] + from_z) * m.fine[1] + from_y) * m.fine[2];
    lines[0] = lines[m.fine[2] + 1] = none;
    if (!exists) {
      for (int64_t x = 0; x < m.fine[2]; ++x) lines[x + 1] = none;
      continue;
    }
    for (int64_t x = 0; x < m.fine[2]; ++x) {
      const bool counts = static_cast<uint64_t>(labels[x]) < static_cast<uint64_t>(m.classes);
      lines[x + 1] = counts ? static_cast<int32_t>(labels[x]) : none;
    }
  }
}

// What all lines hold at each place, or −1.
inline void find_shared(const SumsShape& shape, int64_t length, const int32_t* lines, int32_t* shared) {
  std::memcpy(shared, lines, static_cast<size_t>(length) * sizeof(int32_t));
  for (int64_t line = 1; line < shape.lines; ++line)
    for (int64_t x = 0; x < length; ++x) shared[x] = lines[line * length + x] == shared[x] ? shared[x] : -1;
}

// Adds every cell of a line to the sums of the classes around it: once where that is one class for all taps, as it
// is for most cells of a segmentation.
template <class I>
void add_exact_line(const ak_class_maps& m, const SumsShape& shape, int64_t width, const SumsScratch& scratch) {
  const int64_t classes = m.classes + 1, length = m.fine[2];
  for (int64_t x = 0; x < length; ++x) {
    const float* cell = scratch.cells + x * sums_group;
    const int32_t* shared = scratch.shared + x;
    if (shared[0] >= 0 && shared[0] == shared[1] && shared[0] == shared[2]) {
      int64_t last = x;  // of cells that the same class surrounds
      while (last + 1 < length && scratch.shared[last + 3] == shared[0]) ++last;
      float* sums = scratch.alike + shared[0] * sums_group;
      for (int64_t c = 0; c < width; c += I::lanes) {
        typename I::Vec sum = I::load(sums + c);
        for (int64_t k = 0; k <= last - x; ++k) sum = I::add(sum, I::load(cell + k * sums_group + c));
        I::store(sums + c, sum);
      }
      x = last;
      continue;
    }
    for (int64_t line = 0; line < shape.lines; ++line)
      for (int64_t tap = 0; tap < 3; ++tap) {
        const int64_t class_ = scratch.labels[line * (length + 2) + x + 2 - tap];
        float* sums = scratch.groups + ((line * 3 + tap) * classes + class_) * sums_group;
        for (int64_t c = 0; c < width; c += I::lanes) I::store(sums + c, I::add(I::load(sums + c), I::load(cell + c)));
      }
  }
}

template <class I>
void add_exact_block(const ClassSumsCall& call, const SumsShape& shape, int64_t image, int64_t first, int64_t last,
                     const SumsScratch& scratch, float* sums) {
  const ak_class_maps& m = call.what;
  const int64_t inner = m.axes == 2 ? 1 : m.coarse[1], classes = m.classes + 1;
  for (int64_t channel = 0; channel < m.channels; channel += sums_group) {
    const int64_t channels = m.channels - channel < sums_group ? m.channels - channel : sums_group;
    const int64_t width = whole_vectors<I>(channels);
    std::memset(scratch.groups, 0, static_cast<size_t>(shape.lines * 3 * classes * sums_group) * sizeof(float));
    std::memset(scratch.alike, 0, static_cast<size_t>(classes * sums_group) * sizeof(float));
    for (int64_t row = first; row < last; ++row)
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t z = m.axes == 2 ? 0 : row, y = m.axes == 2 ? row : i;
        load_label_lines(m, shape, image, z, y, m.axes == 2 ? row > first : i > 0, scratch.labels);
        find_shared(shape, m.fine[2] + 2, scratch.labels, scratch.shared);
        load_cells(call, image * call.strides[0] + z * call.strides[2] + y * call.strides[3], channel, channels,
                   width, scratch.cells);
        add_exact_line<I>(m, shape, width, scratch);
      }
    for (int64_t line = 0; line < shape.lines; ++line)
      for (int64_t class_ = 0; class_ < m.classes; ++class_)
        for (int64_t tap = 0; tap < 3; ++tap) {
          const float* some = scratch.groups + ((line * 3 + tap) * classes + class_) * sums_group;
          const float* alike = scratch.alike + class_ * sums_group;
          float* out = sums + (line * shape.columns + class_ * 3 + tap) * shape.padded_channels + channel;
          for (int64_t c = 0; c < width; ++c) out[c] = some[c] + alike[c];
        }
  }
}

// ------------------------------------------------------------------------------------------ both

// call.sums (class, channel, tap) from the sums of the tasks.
inline void add_tasks_up(const ClassSumsCall& call, const SumsShape& shape, const SumsWork& work) {
  const ak_class_maps& m = call.what;
  parallel_for(call.threads, shape.lines * shape.columns, [&](int64_t row) {
    const int64_t line = row / shape.columns, class_ = row % shape.columns / 3, tap = line * 3 + row % 3;
    for (int64_t c = 0; c < m.channels; ++c) {
      double sum = 0;
      for (int64_t task = 0; task < shape.tasks; ++task)
        sum += work.sums[task * shape.sums + row * shape.padded_channels + c];
      call.sums[(class_ * m.channels + c) * shape.lines * 3 + tap] = static_cast<float>(sum);
    }
  });
}

template <class I>
void class_sums(const ClassSumsCall& call) {
  const ak_class_maps& m = call.what;
  const SumsShape shape(m);
  const SumsWork work(call, shape);
  set_readings(m, work);
  WorkQueue queue(shape.tasks);
  parallel(shape.tasks < call.threads ? static_cast<int>(shape.tasks) : call.threads, [&](int thread) {
    const SumsScratch scratch = work.scratch(call, shape, thread);
    for (int64_t task = queue.take(); task >= 0; task = queue.take()) {
      const int64_t image = task / shape.blocks, first = task % shape.blocks * shape.block_rows;
      const int64_t rows = m.coarse[shape.axis], last = first + shape.block_rows < rows ? first + shape.block_rows : rows;
      float* sums = work.sums + task * shape.sums;
      std::memset(sums, 0, static_cast<size_t>(shape.sums) * sizeof(float));
      if (is_exact(m)) {
        add_exact_block<I>(call, shape, image, first, last, scratch, sums);
      } else {
        std::memset(scratch.block + (last - first) * shape.row_weights, 0, sums_group * sizeof(float));
        weigh_block<I>(m, shape, work, image, first, last, scratch);
        add_block<I>(call, shape, image, first, last, scratch, sums);
      }
    }
  });
  add_tasks_up(call, shape, work);
}

}  // namespace

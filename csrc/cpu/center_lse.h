// center_lse: the log-sum-exp of each row's logits to a few centres, and its gradient, for any instruction set I
// (vector_*.h).
//
// A row is read once, in products with several centres at a time. Logits lie by centre, [centre][row], so that
// maxima and exponentials are those of whole vectors however few centres there are. The forward pass leaves the
// probabilities, from which, with the centres, the backward pass writes the gradient and reads no row.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "pack.h"
#include "parallel.h"

namespace {

using action_kernels::CenterCall;

constexpr int64_t center_task_rows = 96;  // a multiple of center_rows and of all product_rows
constexpr int64_t center_rows = 16;       // whose logits lie together; a multiple of all lanes
constexpr int64_t rows_ahead = 8;         // are asked for in advance
constexpr int64_t center_columns = 256;   // of rows in half precision that are floats at a time

// Centres whose products with four rows are summed at once, each in a register.
template <class I>
constexpr int centers_at_once = I::score_rows * I::score_vectors < 16 ? 2 : 4;

// With call.workspace NULL only the size is right.
template <class I>
struct CenterWork {
  explicit CenterWork(const CenterCall& call) : stride(whole_vectors<I>(call.dim)), arena(call.workspace) {
    if (stride > call.dim) padded = arena.take<float>(call.count * stride);
    logits = arena.take<float>(call.threads * call.count * center_rows);
  }

  int64_t stride;           // of centres, which then are whole vectors
  Arena arena;
  float* padded = nullptr;  // centres with zeros behind them, where they are not whole vectors themselves
  float* logits;            // [thread][centre][row]
};

template <class I>
int64_t center_workspace(const CenterCall& call) {
  CenterCall counting = call;
  counting.workspace = nullptr;
  return CenterWork<I>(counting).arena.bytes();
}

// The centres in whole vectors.
template <class I>
const float* pad_centers(const CenterCall& call, const CenterWork<I>& work) {
  if (!work.padded) return call.centers;
  for (int64_t c = 0; c < call.count; ++c) {
    float* to = work.padded + c * work.stride;
    std::memcpy(to, call.centers + c * call.dim, static_cast<size_t>(call.dim) * sizeof(float));
    for (int64_t k = call.dim; k < work.stride; ++k) to[k] = 0;
  }
  return work.padded;
}

// body(thread, first row, last row) for all rows by tasks.
template <class Body>
void for_tasks_of_rows(const CenterCall& call, const Body& body) {
  const int64_t count = call.rows.rows, tasks = (count + center_task_rows - 1) / center_task_rows;
  WorkQueue queue(tasks);
  parallel(tasks < call.threads ? static_cast<int>(tasks) : call.threads, [&](int thread) {
    for (int64_t task = queue.take(); task >= 0; task = queue.take()) {
      const int64_t first = task * center_task_rows, left = count - first;
      body(thread, first, first + (left < center_task_rows ? left : center_task_rows));
    }
  });
}

inline bool takes_part(const CenterCall& call, int64_t row) { return !call.rows.mask || call.rows.mask[row]; }

// ------------------------------------------------------------------------------------------ forward

// logits[c][r] += rows[r] · centers[c] over `columns` columns, whole vectors, of four rows and Count centres.
template <class I, int Count>
AK_NOINLINE void logit_block(const float* const* rows, const float* centers, int64_t stride, int64_t columns,
                             float* logits) {
  typename I::Vec sums[Count][4];
  AK_UNROLL for (int c = 0; c < Count; ++c)
    AK_UNROLL for (int r = 0; r < 4; ++r) sums[c][r] = I::zero();
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  for (int64_t k = 0; k < columns; k += I::lanes) {
    const typename I::Vec row[4] = {I::load(a + k), I::load(b + k), I::load(c + k), I::load(d + k)};
    AK_UNROLL for (int i = 0; i < Count; ++i) {
      const typename I::Vec center = I::load(centers + i * stride + k);
      AK_UNROLL for (int r = 0; r < 4; ++r) sums[i][r] = I::fma(row[r], center, sums[i][r]);
    }
  }
  AK_UNROLL for (int i = 0; i < Count; ++i) {
    float four[4];
    I::sums_of_four(sums[i], four);
    AK_UNROLL for (int r = 0; r < 4; ++r) logits[i * center_rows + r] += four[r];
  }
}

// All centres, Count at a time; the last ones may be fewer.
template <class I, int Count = centers_at_once<I>>
void add_logits(const float* const* rows, const float* centers, int64_t stride, int64_t count, int64_t columns,
                float* logits) {
  for (; count >= Count; count -= Count, centers += Count * stride, logits += Count * center_rows)
    logit_block<I, Count>(rows, centers, stride, columns, logits);
  if constexpr (Count > 1) {
    if (count > 0) add_logits<I, Count - 1>(rows, centers, stride, count, columns, logits);
  }
}

// Columns of a row from `column` on as floats in whole vectors: where they lie, or in `room` with zeros behind
// them. Returns how many there are.
template <class I>
AK_INLINE int64_t load_columns(const CenterCall& call, int64_t row, int64_t column, float* room, const float** at) {
  const int64_t place = row * call.rows.row_stride + column, left = call.dim - column;
  if (call.rows.dtype == AK_FLOAT32 && left >= I::lanes) {
    *at = static_cast<const float*>(call.rows.data) + place;
    return left / I::lanes * I::lanes;
  }
  const int64_t columns = left < center_columns ? left : center_columns, whole = whole_vectors<I>(columns);
  load_floats(call.rows.data, call.rows.dtype, place, columns, room);
  for (int64_t k = columns; k < whole; ++k) room[k] = 0;
  *at = room;
  return whole;
}

// logits[c][r] of the rows from `first` on; beyond the last row they are its own.
template <class I>
void find_logits(const CenterCall& call, const float* centers, int64_t stride, int64_t first, float* logits) {
  std::memset(logits, 0, static_cast<size_t>(call.count * center_rows) * sizeof(float));
  float room[4][center_columns];
  const float* rows[4];
  for (int64_t four = 0; four < center_rows && first + four < call.rows.rows; four += 4) {
    for (int64_t r = 0; r < 4; ++r) ask_for_row(call.rows, first + four + r + rows_ahead, call.dim);
    for (int64_t column = 0, columns = 0; column < call.dim; column += columns) {
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t row = first + four + r < call.rows.rows ? first + four + r : call.rows.rows - 1;
        columns = load_columns<I>(call, row, column, room[r], rows + r);
      }
      add_logits<I>(rows, centers + column, stride, call.count, columns, logits + four);
    }
  }
}

// What the log-sum-exps of a block are made of: maximum + log(sum).
struct CenterSums {
  float maxima[center_rows], sums[center_rows];
};

// Products become probabilities. An infinite logit gives an infinite log-sum-exp, as it does elsewhere: the
// largest finite number stands for the maximum.
template <class I>
void normalise(const CenterCall& call, float* logits, CenterSums& found) {
  const typename I::Vec scale = I::set(static_cast<float>(call.scale));
  for (int64_t lane = 0; lane < center_rows; lane += I::lanes) {
    float* const end = logits + call.count * center_rows + lane;
    typename I::Vec maximum = I::set(lowest), sum = I::zero();
    for (float* place = logits + lane; place < end; place += center_rows) {
      const typename I::Vec logit = I::multiply(scale, I::load(place));
      I::store(place, logit);
      maximum = I::at_least(maximum, logit);
    }
    maximum = I::at_most(I::set(-lowest), maximum);
    for (float* place = logits + lane; place < end; place += center_rows) {
      const typename I::Vec below = I::subtract(I::load(place), maximum);
      const typename I::Vec power = exp_any<I>(I::at_most(I::set(89.0f), below));  // of 89: infinity
      I::store(place, power);
      sum = I::add(sum, power);
    }
    const typename I::Vec share = I::divide(I::set(1.0f), sum);
    for (float* place = logits + lane; place < end; place += center_rows)
      I::store(place, I::multiply(share, I::load(place)));
    I::store(found.maxima + lane, maximum);
    I::store(found.sums + lane, sum);
  }
}

// [centre][row] → [row][centre].
inline void store_probabilities(const float* by_center, int64_t count, int64_t rows, float* by_row) {
  const int64_t whole_rows = rows / 4 * 4, whole_count = count / 4 * 4;
  for (int64_t c = 0; c < whole_count; c += 4)
    for (int64_t r = 0; r < whole_rows; r += 4)
      transpose_block<false>(by_center + c * center_rows + r, center_rows, 1.0f, by_row + r * count + c, count);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_count : 0; c < count; ++c)
      by_row[r * count + c] = by_center[c * center_rows + r];
}

// Of up to center_rows rows.
template <class I>
void center_block(const CenterCall& call, const float* centers, int64_t stride, int64_t first, int64_t rows,
                  float* logits) {
  CenterSums found;
  find_logits<I>(call, centers, stride, first, logits);
  normalise<I>(call, logits, found);
  float* probabilities = call.probabilities + first * call.count;
  store_probabilities(logits, call.count, rows, probabilities);
  for (int64_t r = 0; r < rows; ++r) {
    const bool counts = takes_part(call, first + r);
    call.lse[first + r] = counts ? found.maxima[r] + std::log(found.sums[r]) : 0;
    for (int64_t c = counts ? call.count : 0; c < call.count; ++c) probabilities[r * call.count + c] = 0;
  }
}

template <class I>
void center_forward(const CenterCall& call) {
  const CenterWork<I> work(call);
  const float* centers = pad_centers(call, work);
  for_tasks_of_rows(call, [&](int thread, int64_t first, int64_t last) {
    float* logits = work.logits + thread * call.count * center_rows;
    for (; first < last; first += center_rows)
      center_block<I>(call, centers, work.stride, first, last - first < center_rows ? last - first : center_rows,
                      logits);
  });
}

// ------------------------------------------------------------------------------------------ backward

// out[r] = factors[r] · Σ_c probabilities[r][c] · centers[c] for Rows rows and Vectors vectors of columns.
template <class I, int Rows, int Vectors>
AK_NOINLINE void weigh_block(const float* probabilities, const float* factors, const float* centers, int64_t stride,
                             int64_t count, float* out, int64_t out_stride) {
  typename I::Vec sums[Rows][Vectors];
  AK_UNROLL for (int r = 0; r < Rows; ++r)
    AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::zero();
  for (int64_t c = 0; c < count; ++c) {
    typename I::Vec center[Vectors];
    AK_UNROLL for (int v = 0; v < Vectors; ++v) center[v] = I::load(centers + c * stride + v * I::lanes);
    AK_UNROLL for (int r = 0; r < Rows; ++r) {
      const typename I::Vec probability = I::broadcast(probabilities + r * count + c);
      AK_UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = I::fma(probability, center[v], sums[r][v]);
    }
  }
  AK_UNROLL for (int r = 0; r < Rows; ++r)
    AK_UNROLL for (int v = 0; v < Vectors; ++v)
      I::store(out + r * out_stride + v * I::lanes, I::multiply(I::broadcast(factors + r), sums[r][v]));
}

// The gradient of Rows rows, Vectors vectors of columns at a time; the last ones may be fewer.
template <class I, int Rows, int Vectors = I::product_vectors>
void weigh_rows(const CenterCall& call, const float* centers, int64_t stride, int64_t first, const float* factors,
                int64_t column = 0) {
  constexpr int64_t width = Vectors * I::lanes;
  const float* probabilities = call.saved_probabilities + first * call.count;
  for (; stride - column >= width; column += width) {
    const int64_t columns = call.dim - column < width ? call.dim - column : width, place = first * call.dim + column;
    if (call.rows.dtype == AK_FLOAT32 && columns == width) {
      float* out = static_cast<float*>(call.grad_rows) + place;
      weigh_block<I, Rows, Vectors>(probabilities, factors, centers + column, stride, call.count, out, call.dim);
      continue;
    }
    float room[Rows * width];
    weigh_block<I, Rows, Vectors>(probabilities, factors, centers + column, stride, call.count, room, width);
    for (int64_t r = 0; r < Rows; ++r)
      store_floats(room + r * width, columns, call.grad_rows, call.rows.dtype, place + r * call.dim);
  }
  if constexpr (Vectors > 1) {
    if (column < stride) weigh_rows<I, Rows, Vectors - 1>(call, centers, stride, first, factors, column);
  }
}

template <class I>
void center_backward(const CenterCall& call) {
  const CenterWork<I> work(call);
  const float* centers = pad_centers(call, work);
  for_tasks_of_rows(call, [&](int, int64_t first, int64_t last) {
    float factors[center_task_rows];
    for (int64_t row = first; row < last; ++row)
      factors[row - first] = takes_part(call, row) ? static_cast<float>(call.scale) * call.grad_lse[row] : 0;
    int64_t row = first;
    for (; row + I::product_rows <= last; row += I::product_rows)
      weigh_rows<I, I::product_rows>(call, centers, work.stride, row, factors + row - first);
    for (; row < last; ++row) weigh_rows<I, 1>(call, centers, work.stride, row, factors + row - first);
  });
}

}  // namespace

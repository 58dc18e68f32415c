// indexed_lse: log-sum-exp over bank rows that an index names, and their mean under its weights, for any
// instruction set I (vector_*.h).
//
// A run of queries shares a row of the index. Where it has enough queries for the blocks of micro_kernels.h
// ("shared"), bank rows are gathered into packed tiles that all of its queries meet; elsewhere each query
// takes dot products with rows gathered a few at a time, which it still finds in the first cache when their
// mean is taken. Either way every bank row is fetched once, each query has a running maximum, and its result
// depends on neither the number of threads nor the other queries of its task.
#pragma once

#include <cmath>

#include "kernels.h"
#include "pack.h"

namespace {

using action_kernels::IndexedCall;

constexpr int64_t shared_queries = 96;  // of a run in a task
constexpr int64_t shared_keys = tile_rows;
constexpr int64_t gathered_keys = 32;   // at a time, where every query has its own
constexpr int64_t gathered_queries = 8; // of all runs, in a task
constexpr int64_t keys_ahead = 4;       // whose rows are asked for in advance

inline int64_t queries_a_run(const IndexedCall& call) { return call.runs ? call.queries.rows / call.runs : 0; }

// What the online log-sum-exp of a query has come to: maximum + log(sum).
struct RunningSum {
  float maximum;
  double sum;
};

inline float log_of(const RunningSum& running) {
  return static_cast<float>(running.sum == 0 ? -INFINITY : running.maximum + std::log(running.sum));
}

// scores[j] → e^(scores[j] − maximum) over whole vectors, the larger of the maximum so far and theirs, and adds
// them up. Returns what earlier sums must be multiplied by; 0 while there are none.
template <class I>
float turn_into_powers(float* scores, int64_t count, RunningSum& running) {
  float maximum = running.maximum;
  for (int64_t j = 0; j < count; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
  const float change = running.sum == 0 ? 0.0f : std::exp(running.maximum - maximum);
  // All scores `lowest` or NaN: a difference of two `lowest` must give the power 0.
  const typename I::Vec shift = I::set(maximum == lowest ? 0.0f : maximum);
  typename I::Vec sum = I::zero();
  for (int64_t j = 0; j < count; j += I::lanes) {
    const typename I::Vec power = exp_any<I>(I::subtract(I::load(scores + j), shift));
    I::store(scores + j, power);
    sum = I::add(sum, power);
  }
  running.sum = running.sum * change + sum_of_lanes<I>(sum);
  running.maximum = maximum;
  return change;
}

template <class I>
void scale_row(float* row, int64_t count, float factor) {
  for (int64_t c = 0; c < count; c += I::lanes) I::store(row + c, I::multiply(I::set(factor), I::load(row + c)));
}

// The lse and, if wanted, mean of a query, from the weighted sum of its bank rows.
inline void write_result(const IndexedCall& call, int64_t query, const RunningSum& running, const float* weighted) {
  call.lse[query] = log_of(running);
  if (!call.mean) return;
  const float factor = running.sum == 0 ? 0.0f : static_cast<float>(1 / running.sum);
  float* mean = call.mean + query * call.dim;
  for (int64_t c = 0; c < call.dim; ++c) mean[c] = factor == 0 ? 0.0f : factor * weighted[c];
}

// The bank rows that a run sums over: those of its index that exist. Returns how many.
inline int64_t rows_of_run(const IndexedCall& call, int64_t run, int64_t* rows) {
  int64_t count = 0;
  for (int64_t j = 0; j < call.columns; ++j) {
    const int64_t row = call.index[run * call.columns + j];
    if (row >= 0 && row < call.bank.rows) rows[count++] = row;
  }
  return count;
}

template <class I>
int64_t padded_dim(int64_t dim) {
  return (dim + Blocking<I>::slice - 1) / Blocking<I>::slice * Blocking<I>::slice;
}

// ------------------------------------------------------------------------------------------ shared rows

// What a thread needs to itself.
struct SharedScratch {
  PackedRows queries;
  PackedRows keys;
  int64_t* rows;        // of the bank, of the whole run
  float* tile;          // scores, then their powers: tile_rows columns
  float* weighted;      // (shared_queries padded to panels, dim padded to vectors): sums of powers · bank rows
  RunningSum* running;  // of every query
};

template <class I>
SharedScratch take_shared(Arena& arena, const IndexedCall& call) {
  ak_rows queries = call.queries, keys = call.bank;
  queries.rows = shared_queries;
  keys.rows = shared_keys;
  queries.mask = keys.mask = nullptr;
  SharedScratch scratch;
  scratch.queries = take_packed_rows<I>(arena, queries, call.dim, {true, false, false});
  scratch.keys = take_packed_rows<I>(arena, keys, call.dim, {false, true, true});
  scratch.queries.index = arena.take<int64_t>(scratch.queries.capacity);
  scratch.rows = arena.take<int64_t>(call.columns);
  scratch.tile = arena.take<float>(scratch.queries.capacity * tile_rows);
  scratch.weighted = arena.take<float>(scratch.queries.capacity * padded_dim<I>(call.dim));
  scratch.running = arena.take<RunningSum>(scratch.queries.capacity);
  return scratch;
}

template <class I>
void pack_some(const ak_rows& rows, PackedRows& packed, int64_t count, int64_t dim, float factor) {
  packed.valid = count;
  packed.padded = round_up_to_panel<I>(count);
  for (int64_t panel = 0; panel < packed.padded / Blocking<I>::panel; ++panel)
    pack_panel<I>(rows, packed, panel, dim, factor);
}

// Scores of the packed queries with the packed keys; `lowest` beyond the keys.
template <class I>
void score_tile(const IndexedCall& call, const SharedScratch& scratch) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  for (int64_t column = 0; column < scratch.keys.padded; column += panel)
    for (int64_t row = 0; row < scratch.queries.valid; row += I::score_rows)
      score_block<I>(scratch.queries.slices + row * slice, scratch.queries.capacity * slice,
                     scratch.keys.panels + column * call.dim, call.dim, 1.0f,
                     scratch.tile + row * tile_rows + column, tile_rows);
  for (int64_t row = 0; row < scratch.queries.valid; ++row)
    for (int64_t column = scratch.keys.valid; column < scratch.keys.padded; ++column)
      scratch.tile[row * tile_rows + column] = lowest;
}

// weighted += powers · keys, Vectors at a time; the last columns may need fewer.
template <class I, int Vectors = I::product_vectors>
void add_weighted(const IndexedCall& call, const SharedScratch& scratch, int64_t column = 0) {
  constexpr int64_t slice = Blocking<I>::slice, width = Vectors * I::lanes;
  const int64_t stride = padded_dim<I>(call.dim);
  for (; call.dim - column > width - I::lanes; column += slice) {
    const float* features = scratch.keys.features + column * scratch.keys.capacity;
    for (int64_t row = 0; row < scratch.queries.valid; row += I::product_rows) {
      const int64_t left = scratch.queries.valid - row, rows = left < I::product_rows ? left : I::product_rows;
      float* out[I::product_rows];
      for (int64_t r = 0; r < rows; ++r) out[r] = scratch.weighted + (row + r) * stride + column;
      product_block<I, false, Vectors>(scratch.tile + row * tile_rows, scratch.keys.padded, features, width, out,
                                       rows);
    }
  }
  if constexpr (Vectors > 1) {
    if (column < call.dim) add_weighted<I, Vectors - 1>(call, scratch, column);
  }
}

template <class I>
void sum_shared(const IndexedCall& call, int64_t run, int64_t first, int64_t count, SharedScratch& scratch) {
  const int64_t stride = padded_dim<I>(call.dim), start = run * queries_a_run(call) + first;
  for (int64_t q = 0; q < count; ++q) scratch.queries.index[q] = start + q;
  pack_some<I>(call.queries, scratch.queries, count, call.dim, 1.0f);
  for (int64_t q = 0; q < count; ++q) scratch.running[q] = {lowest, 0};
  for (int64_t i = 0; i < scratch.queries.capacity * stride; ++i) scratch.weighted[i] = 0;
  const int64_t keys = rows_of_run(call, run, scratch.rows);
  for (int64_t key = 0; key < keys; key += shared_keys) {
    scratch.keys.index = scratch.rows + key;
    pack_some<I>(call.bank, scratch.keys, keys - key < shared_keys ? keys - key : shared_keys, call.dim,
                 static_cast<float>(call.scale));
    score_tile<I>(call, scratch);
    for (int64_t q = 0; q < count; ++q) {
      const float change = turn_into_powers<I>(scratch.tile + q * tile_rows, scratch.keys.padded, scratch.running[q]);
      if (call.mean && change != 1 && key > 0) scale_row<I>(scratch.weighted + q * stride, stride, change);
    }
    if (call.mean) add_weighted<I>(call, scratch);
  }
  for (int64_t q = 0; q < count; ++q) {
    write_result(call, start + q, scratch.running[q], scratch.weighted + q * stride);
  }
}

// ------------------------------------------------------------------------------------------ rows of its own

struct GatherScratch {
  int64_t* rows;    // of the bank, of the whole run
  float* keys;      // gathered_keys × padded dim
  float* query;     // padded dim
  float* weighted;  // padded dim
};

template <class I>
GatherScratch take_gather(Arena& arena, const IndexedCall& call) {
  const int64_t stride = padded_dim<I>(call.dim);
  GatherScratch scratch;
  scratch.rows = arena.take<int64_t>(call.columns);
  scratch.keys = arena.take<float>(gathered_keys * stride);
  scratch.query = arena.take<float>(stride);
  scratch.weighted = arena.take<float>(stride);
  return scratch;
}

// scores[j] = query · key_j of four keys.
template <class I>
void four_scores(const float* query, const float* keys, int64_t stride, float* scores) {
  typename I::Vec sums[4];
  AK_UNROLL for (int j = 0; j < 4; ++j) sums[j] = I::zero();
  for (int64_t c = 0; c < stride; c += I::lanes) {
    const typename I::Vec q = I::load(query + c);
    AK_UNROLL for (int j = 0; j < 4; ++j) sums[j] = I::fma(q, I::load(keys + j * stride + c), sums[j]);
  }
  I::sums_of_four(sums, scores);
}

// weighted[c] = change · weighted[c] + Σ_j powers[j] · keys[j, c].
template <class I, int Vectors = I::product_vectors>
void add_gathered(const float* powers, const float* keys, int64_t count, int64_t stride, float change,
                  float* weighted) {
  static_assert(Blocking<I>::slice % (Vectors * I::lanes) == 0, "rows are padded to whole slices");
  for (int64_t c = 0; c < stride; c += Vectors * I::lanes) {
    typename I::Vec sums[Vectors];
    AK_UNROLL for (int v = 0; v < Vectors; ++v)
      sums[v] = I::multiply(I::set(change), I::load(weighted + c + v * I::lanes));
    for (int64_t j = 0; j < count; ++j)
      AK_UNROLL for (int v = 0; v < Vectors; ++v)
        sums[v] = I::fma(I::broadcast(powers + j), I::load(keys + j * stride + c + v * I::lanes), sums[v]);
    AK_UNROLL for (int v = 0; v < Vectors; ++v) I::store(weighted + c + v * I::lanes, sums[v]);
  }
}

template <class I>
void sum_gathered(const IndexedCall& call, int64_t query, int64_t keys, const GatherScratch& scratch) {
  const int64_t stride = padded_dim<I>(call.dim);
  load_floats(call.queries.data, call.queries.dtype, query * call.queries.row_stride, call.dim, scratch.query);
  scale_row<I>(scratch.query, stride, static_cast<float>(call.scale));
  for (int64_t c = 0; c < stride; ++c) scratch.weighted[c] = 0;
  RunningSum running = {lowest, 0};
  for (int64_t key = 0; key < keys; key += gathered_keys) {
    const int64_t count = keys - key < gathered_keys ? keys - key : gathered_keys;
    float scores[gathered_keys];
    for (int64_t j = 0; j < count; ++j) {
      if (key + j + keys_ahead < keys) ask_for_row(call.bank, scratch.rows[key + j + keys_ahead], call.dim);
      load_floats(call.bank.data, call.bank.dtype, scratch.rows[key + j] * call.bank.row_stride, call.dim,
                  scratch.keys + j * stride);
    }
    for (int64_t j = 0; j < gathered_keys; ++j) scores[j] = lowest;
    for (int64_t j = 0; j < count; j += 4) four_scores<I>(scratch.query, scratch.keys + j * stride, stride, scores + j);
    for (int64_t j = count; j < gathered_keys; ++j) scores[j] = lowest;
    const float change = turn_into_powers<I>(scores, gathered_keys, running);
    if (call.mean) add_gathered<I>(scores, scratch.keys, count, stride, change, scratch.weighted);
  }
  write_result(call, query, running, scratch.weighted);
}

template <class I>
void sum_gathered_queries(const IndexedCall& call, int64_t first, int64_t last, const GatherScratch& scratch) {
  int64_t run = -1, keys = 0;
  for (int64_t query = first; query < last; ++query) {
    if (query / queries_a_run(call) != run) {
      run = query / queries_a_run(call);
      keys = rows_of_run(call, run, scratch.rows);
    }
    sum_gathered<I>(call, query, keys, scratch);
  }
}

// ------------------------------------------------------------------------------------------ both

template <class I>
bool is_shared(const IndexedCall& call) {
  return queries_a_run(call) >= I::score_rows;
}

// Scratch of every thread; with call.workspace NULL only the size is right.
template <class I>
int64_t indexed_workspace(const IndexedCall& call) {
  Arena arena(nullptr);
  for (int thread = 0; thread < call.threads; ++thread) {
    if (is_shared<I>(call)) {
      take_shared<I>(arena, call);
    } else {
      take_gather<I>(arena, call);
    }
  }
  return arena.bytes();
}

// The part of an arena that starts with what threads before this one take.
template <class Take>
auto scratch_of_thread(void* workspace, int thread, const Take& take) {
  Arena arena(workspace);
  for (int before = 0; before < thread; ++before) take(arena);
  return take(arena);
}

template <class I>
void indexed_lse(const IndexedCall& call) {
  const int64_t of_run = queries_a_run(call);
  if (!is_shared<I>(call)) {
    const int64_t tasks = (call.queries.rows + gathered_queries - 1) / gathered_queries;
    WorkQueue queue(tasks);
    parallel(tasks < call.threads ? static_cast<int>(tasks) : call.threads, [&](int thread) {
      const GatherScratch scratch =
          scratch_of_thread(call.workspace, thread, [&](Arena& arena) { return take_gather<I>(arena, call); });
      // Padding of keys and query is zero throughout.
      const int64_t stride = padded_dim<I>(call.dim);
      for (int64_t i = 0; i < gathered_keys * stride; ++i) scratch.keys[i] = 0;
      for (int64_t i = 0; i < stride; ++i) scratch.query[i] = 0;
      for (int64_t task = queue.take(); task >= 0; task = queue.take()) {
        const int64_t first = task * gathered_queries, left = call.queries.rows - first;
        sum_gathered_queries<I>(call, first, first + (left < gathered_queries ? left : gathered_queries), scratch);
      }
    });
    return;
  }
  const int64_t tasks_a_run = (of_run + shared_queries - 1) / shared_queries, tasks = call.runs * tasks_a_run;
  WorkQueue queue(tasks);
  parallel(tasks < call.threads ? static_cast<int>(tasks) : call.threads, [&](int thread) {
    SharedScratch scratch =
        scratch_of_thread(call.workspace, thread, [&](Arena& arena) { return take_shared<I>(arena, call); });
    for (int64_t task = queue.take(); task >= 0; task = queue.take()) {
      const int64_t first = task % tasks_a_run * shared_queries, left = of_run - first;
      sum_shared<I>(call, task / tasks_a_run, first, left < shared_queries ? left : shared_queries, scratch);
    }
  });
}

}  // namespace

// pairwise_softplus, forward and backward, for any instruction set I (vector_*.h).
//
// With x = offset ± score, softplus(x) = max(x, 0) + log(1 + e^−|x|). Of the logarithms only their sum is
// wanted, which is that of a product: q = Π (1 + e) − 1 grows by q ← q + e + q e, exact also for e far below
// one. So a pair costs one exponential, as in pairwise_lse, and a tile one logarithm a row at most.
// Panels hold ± scale · keys. Symmetric calls use each score for (i, j) and for (j, i).
#pragma once

#include "pair_tiles.h"

namespace {

using action_kernels::SoftplusCall;

constexpr float largest = 3.402823466e38f;

// The sign is that of the scores: pairs of a class are drawn together, others pushed apart.
inline double signed_scale(const SoftplusCall& call) {
  return call.relation == AK_SAME_CLASS ? -call.scale : call.scale;
}

// What is kept for each anchor; in a symmetric call for each column too.
struct SoftplusSums {
  float* offsets = nullptr;      // finite or NaN: with infinity, a pair that does not count would
  double* linear = nullptr;      // forward: Σ max(x, 0), and the logarithms of products that grew large
  double* products = nullptr;    // forward: Π (1 + e) − 1 of the others
  float* weights = nullptr;      // backward: ± scale · grad
  double* sigmoids = nullptr;    // backward: Σ σ(x)
};

struct SoftplusWorkspace {
  Workspace tiles;
  SoftplusSums sums;
  float* scratch = nullptr;
  int64_t scratch_floats = 0;
  int64_t bytes = 0;
};

// What a thread needs beside `Scratch`: sums of the tile's rows, lane by lane, and of its columns.
struct SoftplusScratch {
  float* row_products;  // tile_rows × lanes
  float* column_products;
};

template <class I>
SoftplusWorkspace take_softplus_workspace(const SoftplusCall& call) {
  Arena arena(call.workspace);
  SoftplusWorkspace work;
  work.tiles = take_workspace<I>(arena, call);
  const int64_t rows = work.tiles.anchors.packed.capacity;
  work.sums.offsets = arena.take<float>(rows);
  if (call.pass == AK_FORWARD) {
    work.sums.linear = arena.take<double>(rows);
    work.sums.products = arena.take<double>(rows);
  } else {
    work.sums.weights = arena.take<float>(rows);
    work.sums.sigmoids = arena.take<double>(rows);
  }
  work.scratch_floats = tile_rows * (I::lanes + 1);
  work.scratch = arena.take<float>(work.scratch_floats * call.threads);
  work.bytes = arena.bytes();
  return work;
}

template <class I>
SoftplusScratch softplus_scratch_of(const SoftplusWorkspace& work, int thread) {
  float* first = work.scratch + thread * work.scratch_floats;
  return {first, first + tile_rows * I::lanes};
}

inline void set_offsets(const SoftplusCall& call, const Side& anchors, SoftplusSums& sums) {
  for (int64_t row = 0; row < anchors.packed.padded; ++row) sums.offsets[row] = 0;
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    const float offset = call.offsets[anchors.packed.original(row)];
    sums.offsets[row] = offset > 0.5f * largest ? 0.5f * largest : offset;
  }
}

// ------------------------------------------------------------------------------------------ forward

// Adds softplus(x) to a sum of its linear part and to a product.
template <class I>
AK_INLINE void add_softplus(typename I::Vec x, typename I::Vec& linear, typename I::Vec& product) {
  const typename I::Vec e = exp_any<I>(I::at_most(x, I::subtract(I::zero(), x)));
  linear = I::add(linear, I::at_least(I::zero(), x));
  product = I::fma(product, e, I::add(product, e));
}

// Joins a product Π (1 + e) − 1 to a row's.
inline void join_product(SoftplusSums& sums, int64_t row, double product) {
  double& all = sums.products[row];
  all += product + all * product;
  if (all > 0x1p500) {
    sums.linear[row] += std::log1p(all);
    all = 0;
  }
}

// A column meets at most this many rows before its product, up to 2 a row, is joined to the others.
constexpr int64_t rows_a_product = 96;

// Adds Σ softplus(offset + score) of the tile's pairs to the sums of its rows and, if Symmetric, of its columns.
template <class I, bool Symmetric>
void add_softplus_sums(const SoftplusCall& call, const Side& anchors, const Side& keys, const Relation& relation,
                       const Tile& tile, const Scratch& scratch, const SoftplusScratch& products,
                       SoftplusSums& sums) {
  using Vec = typename I::Vec;
  constexpr int64_t panel = Blocking<I>::panel;
  const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < rows * I::lanes; i += I::lanes) {
    I::store(scratch.row_lanes + i, I::zero());
    I::store(products.row_products + i, I::zero());
  }
  for (int64_t j = 0; j < columns; ++j) scratch.column_sums[j] = products.column_products[j] = 0;
  const auto join_columns = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      join_product(sums, tile.column_begin + j, products.column_products[j]);
      products.column_products[j] = 0;
    }
  };
  int64_t panel_now = -1, rows_met = 0;
  const float* row_offsets = sums.offsets + tile.row_begin;
  const float* column_offsets = sums.offsets + tile.column_begin;  // if Symmetric
  for_each_score_block<I, false>(
      anchors, keys, call.dim, relation, tile, lowest, scratch.tile,
      [&](int64_t row, int64_t column, const float* scores) {
        if (Symmetric) {
          if (column != panel_now) rows_met = 0;
          panel_now = column;
          if (rows_met + I::score_rows > rows_a_product) {
            join_columns(column, column + panel);
            rows_met = 0;
          }
          rows_met += I::score_rows;
        }
        AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
          float* linear_place = scratch.row_lanes + (row + r) * I::lanes;
          float* product_place = products.row_products + (row + r) * I::lanes;
          Vec linear = I::load(linear_place), product = I::load(product_place);
          const Vec offset = I::broadcast(row_offsets + row + r);
          AK_UNROLL for (int v = 0; v < I::score_vectors; ++v)
            add_softplus<I>(I::add(I::load(scores + r * panel + v * I::lanes), offset), linear, product);
          I::store(linear_place, linear);
          I::store(product_place, product);
        }
        if (!Symmetric) return;
        AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
          float* linear_place = scratch.column_sums + column + v * I::lanes;
          float* product_place = products.column_products + column + v * I::lanes;
          Vec linear = I::load(linear_place), product = I::load(product_place);
          const Vec offset = I::load(column_offsets + column + v * I::lanes);
          AK_UNROLL for (int r = 0; r < I::score_rows; ++r)
            add_softplus<I>(I::add(I::load(scores + r * panel + v * I::lanes), offset), linear, product);
          I::store(linear_place, linear);
          I::store(product_place, product);
        }
      });
  for (int64_t i = 0; i < rows; ++i) {
    double product = 0;  // of all lanes: up to 2^192
    for (int lane = 0; lane < I::lanes; ++lane) {
      const double factor = products.row_products[i * I::lanes + lane];
      product += factor + product * factor;
    }
    join_product(sums, tile.row_begin + i, product);
    sums.linear[tile.row_begin + i] += sum_of_lanes<I>(I::load(scratch.row_lanes + i * I::lanes));
  }
  if (!Symmetric) return;
  join_columns(0, columns);
  for (int64_t j = 0; j < columns; ++j) sums.linear[tile.column_begin + j] += scratch.column_sums[j];
}

inline void write_softplus(const SoftplusCall& call, const Side& anchors, const Relation& relation,
                           const SoftplusSums& sums) {
  for (int64_t row = 0; row < call.anchors.rows; ++row) call.values[row] = 0;
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    if (!relation.has_pair(row)) continue;
    const int64_t original = anchors.packed.original(row);
    const double value = sums.linear[row] + std::log1p(sums.products[row]);
    call.values[original] = call.offsets[original] == INFINITY ? INFINITY : static_cast<float>(value);
  }
}

template <class I>
void softplus_forward(const SoftplusCall& call) {
  SoftplusWorkspace work = take_softplus_workspace<I>(call);
  Side& anchors = work.tiles.anchors;
  Side& keys = call.symmetric ? anchors : work.tiles.keys;
  const Relation& relation = work.tiles.relation;
  prepare_side<I>(call, anchors, signed_scale(call));
  if (!call.symmetric) prepare_side<I>(call, keys, signed_scale(call));
  relate(anchors, keys, work.tiles.relation);
  set_offsets(call, anchors, work.sums);
  for (int64_t row = 0; row < anchors.packed.padded; ++row) work.sums.linear[row] = work.sums.products[row] = 0;
  for_each_tile<I>(call, work.tiles, true, false, [&](const Tile& tile, const Scratch& scratch, int thread) {
    const SoftplusScratch products = softplus_scratch_of<I>(work, thread);
    if (call.symmetric) {
      add_softplus_sums<I, true>(call, anchors, anchors, relation, tile, scratch, products, work.sums);
    } else {
      add_softplus_sums<I, false>(call, anchors, keys, relation, tile, scratch, products, work.sums);
    }
  });
  write_softplus(call, anchors, relation, work.sums);
}

// ------------------------------------------------------------------------------------------ backward

// σ(x) = 1 / (1 + e^−x): 0 below −88.4, where 2^128 in the denominator is infinite.
template <class I>
AK_INLINE typename I::Vec sigmoid(typename I::Vec x) {
  const typename I::Vec one = I::set(1.0f);
  const typename I::Vec power = exp_any<I>(I::at_most(I::set(89.0f), I::subtract(I::zero(), x)));
  return I::divide(one, I::add(one, power));
}

// scratch.tile[i, j] = w_i σ(offset_i + score) + w_j σ(offset_j + score), the parts of columns only if
// Symmetric; 0 for pairs that do not count. Adds the sigmoids to the sums of rows and, if Symmetric, columns.
template <class I, bool Symmetric>
void store_sigmoid_weights(const SoftplusCall& call, const Side& anchors, const Side& keys,
                           const Relation& relation, const Tile& tile, const Scratch& scratch,
                           SoftplusSums& sums) {
  using Vec = typename I::Vec;
  const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < rows * I::lanes; i += I::lanes) I::store(scratch.row_lanes + i, I::zero());
  for (int64_t j = 0; j < columns; ++j) scratch.column_sums[j] = 0;
  const auto turn_into_weights = [&](int64_t row, int64_t column, float* block) {
    AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
      const int64_t i = tile.row_begin + row + r;
      const Vec row_offset = I::broadcast(sums.offsets + i), row_weight = I::broadcast(sums.weights + i);
      float* lanes = scratch.row_lanes + (row + r) * I::lanes;
      Vec row_sum = I::load(lanes);
      AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
        const int64_t c = column + v * I::lanes, j = tile.column_begin + c;
        float* place = block + r * tile_rows + v * I::lanes;
        const Vec score = I::load(place);
        const Vec by_row = sigmoid<I>(I::add(score, row_offset));
        row_sum = I::add(row_sum, by_row);
        Vec weight = I::multiply(row_weight, by_row);
        if (Symmetric) {
          const Vec by_column = sigmoid<I>(I::add(score, I::load(sums.offsets + j)));
          I::store(scratch.column_sums + c, I::add(I::load(scratch.column_sums + c), by_column));
          weight = I::fma(I::load(sums.weights + j), by_column, weight);
        }
        I::store(place, weight);
      }
      I::store(lanes, row_sum);
    }
  };
  for_each_score_block<I, true>(anchors, keys, call.dim, relation, tile, lowest, scratch.tile, turn_into_weights);
  for (int64_t i = 0; i < rows; ++i) {
    sums.sigmoids[tile.row_begin + i] += sum_of_lanes<I>(I::load(scratch.row_lanes + i * I::lanes));
  }
  if (!Symmetric) return;
  for (int64_t j = 0; j < columns; ++j) sums.sigmoids[tile.column_begin + j] += scratch.column_sums[j];
}

inline void set_sigmoid_weights(const SoftplusCall& call, const Side& anchors, const Relation& relation,
                                SoftplusSums& sums) {
  for (int64_t row = 0; row < anchors.packed.padded; ++row) sums.weights[row] = sums.sigmoids[row] = 0;
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    if (!relation.has_pair(row)) continue;
    sums.weights[row] = static_cast<float>(signed_scale(call) * call.grad_values[anchors.packed.original(row)]);
  }
}

inline void write_offset_gradients(const SoftplusCall& call, const Side& anchors, const Relation& relation,
                                   const SoftplusSums& sums) {
  if (!call.grad_offsets) return;
  for (int64_t row = 0; row < call.anchors.rows; ++row) call.grad_offsets[row] = 0;
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    if (!relation.has_pair(row)) continue;
    const int64_t original = anchors.packed.original(row);
    call.grad_offsets[original] = static_cast<float>(call.grad_values[original] * sums.sigmoids[row]);
  }
}

template <class I>
void softplus_backward(const SoftplusCall& call) {
  SoftplusWorkspace work = take_softplus_workspace<I>(call);
  Side& anchors = work.tiles.anchors;
  Side& keys = call.symmetric ? anchors : work.tiles.keys;
  const Relation& relation = work.tiles.relation;
  prepare_side<I>(call, anchors, signed_scale(call));
  if (!call.symmetric) prepare_side<I>(call, keys, signed_scale(call));
  relate(anchors, keys, work.tiles.relation);
  set_offsets(call, anchors, work.sums);
  set_sigmoid_weights(call, anchors, relation, work.sums);
  if (call.grad_anchors) start_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) start_gradient(call, keys, call.grad_keys);
  // Rows always: of their sigmoids, if not of their gradient.
  for_each_tile<I>(call, work.tiles, true, keys.gradient, [&](const Tile& tile, const Scratch& scratch, int) {
    if (call.symmetric) {
      store_sigmoid_weights<I, true>(call, anchors, anchors, relation, tile, scratch, work.sums);
    } else {
      store_sigmoid_weights<I, false>(call, anchors, keys, relation, tile, scratch, work.sums);
    }
    add_weighted_features<I>(call, anchors, keys, tile, scratch);
  });
  if (call.grad_anchors) finish_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) finish_gradient(call, keys, call.grad_keys);
  write_offset_gradients(call, anchors, relation, work.sums);
}

template <class I>
int64_t softplus_workspace(const SoftplusCall& call) {
  SoftplusCall counting = call;
  counting.workspace = nullptr;
  return take_softplus_workspace<I>(counting).bytes;
}

}  // namespace

// pairwise_lse, forward and backward, for any instruction set I (vector_*.h).
//
// Where twice the bound scale · log2(e) · max‖anchor‖ · max‖key‖ is at most 126, the powers and the sums of
// them stay within the exponents of float32 whatever the data are, so no maximum is subtracted ("plain");
// panels then hold scale · log2(e) · keys, and scores are exponents of 2. Elsewhere each row has a running
// maximum ("online"), panels hold scale · keys and scores are exponents of e: large scores then differ from
// the returned log-sum-exp by exactly what they should, where a change of units would round both.
// Symmetric calls use each score for (i, j) and for (j, i).
#pragma once

#include "pair_tiles.h"

namespace {

using action_kernels::LseCall;

constexpr double log2_e = 1.4426950408889634;

// The powers 2^score of all tiles, kept from a symmetric, bounded forward pass for the backward pass; tiles
// lie in the order of their tasks, block_rows × block_rows each. What they were computed with stands in
// front: a backward pass under another instruction set or thread count recomputes them instead.
struct Kept {
  struct Header {
    int64_t instruction_set;  // by its register blocking; 0: nothing is kept
    int64_t block_rows;
    int64_t padded;
  };
  static constexpr int64_t header_floats = 16;  // a cache line
  static_assert(sizeof(Header) <= header_floats * sizeof(float), "the header fits its line");
  static constexpr int64_t largest_bytes = 32 << 20;  // beyond, they leave the caches
  static constexpr int64_t least_dim = 96;            // below, computing them again costs no more

  Header* header = nullptr;
  float* powers = nullptr;
  int64_t block_rows = 0;

  float* tile(int64_t task) const { return powers + task * block_rows * block_rows; }
};

// What is kept for each anchor; in a symmetric call for each column too.
struct LseTerms {
  // Forward: log-sum-exp is maxima + log(sums).
  double* sums = nullptr;
  float* maxima = nullptr;
  // Backward: weights are scale · grad_lse · e^−lse (plain), or scale · grad_lse beside lse (online).
  float* weights = nullptr;
  float* lse = nullptr;
};

struct LseWorkspace {
  Workspace tiles;
  LseTerms terms;
  int64_t bytes = 0;
};

// Lays out the workspace; with call.workspace NULL only its size is right.
template <class I>
LseWorkspace take_lse_workspace(const LseCall& call) {
  Arena arena(call.workspace);
  LseWorkspace work;
  work.tiles = take_workspace<I>(arena, call);
  const int64_t rows = work.tiles.anchors.packed.capacity;
  if (call.pass == AK_FORWARD) {
    work.terms.sums = arena.take<double>(rows);
    work.terms.maxima = arena.take<float>(rows);
  } else {
    work.terms.weights = arena.take<float>(rows);
    work.terms.lse = arena.take<float>(rows);
  }
  work.bytes = arena.bytes();
  return work;
}

// Whether scale · grad_lse · e^−lse, too, stays clear of overflow and underflow. True in forward passes.
inline bool weights_are_bounded(const LseCall& call, const PackedRows& packed) {
  if (call.pass == AK_FORWARD) return true;
  float largest = 0;
  for (int64_t row = 0; row < packed.valid; ++row) {
    largest = larger_or_nan(std::fabs(call.grad_lse[packed.original(row)]), largest);
  }
  const double weight = call.scale * largest;
  return weight == 0 || (weight >= 0x1p-32 && weight <= 0x1p32);
}

// Prepares both sides; returns whether no maximum is needed. (Not for NaN.)
template <class I>
bool prepare_sides(const LseCall& call, Side& anchors, Side& keys, Relation& relation) {
  const double to_base_2 = call.scale * log2_e;
  prepare_side<I>(call, anchors, to_base_2);
  if (!call.symmetric) prepare_side<I>(call, keys, to_base_2);
  const double norms = std::sqrt(largest_squared_norm<I>(anchors.packed)) *
                       std::sqrt(largest_squared_norm<I>(keys.packed));
  const bool bounded = 2 * to_base_2 * norms <= 126.0 && weights_are_bounded(call, anchors.packed);
  if (!bounded) {
    keys.factor = static_cast<float>(call.scale);
    if (I::depth == 1) pack_rows<I>(keys.rows, keys.packed, call.dim, keys.factor, call.threads);
  }
  relate(anchors, keys, relation);
  return bounded;
}

// Bytes that the tiles of a call need, 0 if they are not kept: keys of their own, products of bfloat16 (cheap
// to compute again), too few columns, too many rows. Fewer rows (a mask) do not need more.
template <class I>
int64_t lse_kept(const LseCall& call) {
  if (!call.symmetric || call.relation != AK_ANY_CLASS || I::depth > 1 || call.dim < Kept::least_dim) return 0;
  Side side;
  cut_into_blocks<I>(call, side, round_up_to_panel<I>(call.anchors.rows));
  const int64_t floats = PairSchedule(side.blocks).tasks() * side.block_rows * side.block_rows;
  const int64_t bytes = (Kept::header_floats + floats) * static_cast<int64_t>(sizeof(float));
  return floats == 0 || bytes > Kept::largest_bytes ? 0 : bytes;
}

template <class I>
constexpr int64_t kept_by() {
  return 100 * Blocking<I>::panel + I::lanes;
}

// Whether a forward pass on this instruction set has left anything to this call.
template <class I>
bool is_kept(const LseCall& call) {
  if (!call.kept || call.kept_bytes < static_cast<int64_t>(sizeof(Kept::Header))) return false;
  return static_cast<const Kept::Header*>(call.kept)->instruction_set == kept_by<I>();
}

// The kept tiles of a call; without any, powers is NULL. A forward pass fills in the header, a backward pass
// compares it.
template <class I>
Kept kept_of(const LseCall& call, const Side& side, bool bounded) {
  Kept kept;
  if (!call.kept) return kept;
  const Kept::Header header = {kept_by<I>(), side.block_rows, side.packed.padded};
  kept.header = static_cast<Kept::Header*>(call.kept);
  const int64_t needed = lse_kept<I>(call);
  bool usable = bounded && needed > 0 && needed <= call.kept_bytes;
  if (call.pass == AK_FORWARD) {
    *kept.header = usable ? header : Kept::Header{};
  } else {
    usable = usable && std::memcmp(kept.header, &header, sizeof header) == 0;
  }
  kept.powers = usable ? static_cast<float*>(call.kept) + Kept::header_floats : nullptr;
  kept.block_rows = side.block_rows;
  return kept;
}

// ------------------------------------------------------------------------------------------ forward

// Adds Σ 2^score of the tile to the sums of its rows and, if Symmetric, of its columns. If Keep, the powers
// are written to `kept`, whose rows lie `kept_stride` apart.
template <class I, bool Symmetric, bool Keep>
void add_sums_plain(const Side& anchors, const Side& keys, int64_t dim, const Relation& relation, const Tile& tile,
                    const Scratch& scratch, const LseTerms& terms, float* kept, int64_t kept_stride) {
  using Vec = typename I::Vec;
  constexpr int64_t panel = Blocking<I>::panel;
  const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < rows; ++i) I::store(scratch.row_lanes + i * I::lanes, I::zero());
  for (int64_t j = 0; j < columns; ++j) scratch.column_sums[j] = 0;
  for_each_score_block<I, false>(
      anchors, keys, dim, relation, tile, masked_if_bounded, scratch.tile,
      [&](int64_t row, int64_t column, const float* scores) {
        Vec column_sums[I::score_vectors];
        AK_UNROLL for (int v = 0; v < I::score_vectors; ++v)
          column_sums[v] = I::load(scratch.column_sums + column + v * I::lanes);
        AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
          float* lanes = scratch.row_lanes + (row + r) * I::lanes;
          Vec row_sum = I::load(lanes);
          AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
            const Vec e = exp2_bounded<I>(I::load(scores + r * panel + v * I::lanes));
            row_sum = I::add(row_sum, e);
            if (Keep) I::store(kept + (row + r) * kept_stride + column + v * I::lanes, e);
            if (Symmetric) column_sums[v] = I::add(column_sums[v], e);
          }
          I::store(lanes, row_sum);
        }
        if (!Symmetric) return;
        AK_UNROLL for (int v = 0; v < I::score_vectors; ++v)
          I::store(scratch.column_sums + column + v * I::lanes, column_sums[v]);
      });
  for (int64_t i = 0; i < rows; ++i) {
    terms.sums[tile.row_begin + i] += sum_of_lanes<I>(I::load(scratch.row_lanes + i * I::lanes));
  }
  if (!Symmetric) return;
  for (int64_t j = 0; j < columns; ++j) terms.sums[tile.column_begin + j] += scratch.column_sums[j];
}

// Writes the tile's scores to scratch.tile, `lowest` where there is none.
template <class I>
void store_scores(const Side& anchors, const Side& keys, int64_t dim, const Relation& relation, const Tile& tile,
                  const Scratch& scratch) {
  if (tile.diagonal) {  // blocks below the diagonal are not computed
    for (int64_t i = 0; i < tile_rows * tile_rows; ++i) scratch.tile[i] = lowest;
  }
  for_each_score_block<I, true>(anchors, keys, dim, relation, tile, lowest, scratch.tile,
                                [](int64_t, int64_t, float*) {});
}

// Brings a row's sum from its maximum so far to the larger of that and `maximum`, which is returned; adds
// nothing yet. While a row has met no score its sum is 0 and its maximum `lowest`.
inline float raise_maximum(const LseTerms& terms, int64_t row, float maximum) {
  const float before = terms.maxima[row];
  if (!(maximum > before)) return before;
  terms.sums[row] *= std::exp(static_cast<double>(before) - maximum);
  terms.maxima[row] = maximum;
  return maximum;
}

// Scores minus this: a difference of two `lowest` must give 0 as its power, not 1.
inline float shift_of(float maximum) { return maximum == lowest ? 0.0f : maximum; }

template <class I>
void add_row_sums_online(const LseTerms& terms, const Tile& tile, const Scratch& scratch) {
  using Vec = typename I::Vec;
  const int64_t columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; ++i) {
    const float* scores = scratch.tile + i * tile_rows;
    float maximum = lowest;
    for (int64_t j = 0; j < columns; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
    const Vec shift = I::set(shift_of(raise_maximum(terms, tile.row_begin + i, maximum)));
    Vec sum = I::zero();
    for (int64_t j = 0; j < columns; j += I::lanes) {
      sum = I::add(sum, exp_any<I>(I::subtract(I::load(scores + j), shift)));
    }
    terms.sums[tile.row_begin + i] += sum_of_lanes<I>(sum);
  }
}

template <class I>
void add_column_sums_online(const LseTerms& terms, const Tile& tile, const Scratch& scratch) {
  using Vec = typename I::Vec;
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t columns = tile.column_end - tile.column_begin;
  for (int64_t j = 0; j < columns; ++j) scratch.column_maxima[j] = lowest;
  for (int64_t i = 0; i < rows; ++i) {
    const float* scores = scratch.tile + i * tile_rows;
    for (int64_t j = 0; j < columns; ++j) {
      scratch.column_maxima[j] = scores[j] > scratch.column_maxima[j] ? scores[j] : scratch.column_maxima[j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    scratch.column_maxima[j] = shift_of(raise_maximum(terms, tile.column_begin + j, scratch.column_maxima[j]));
  }
  for (int64_t j = 0; j < columns; j += I::lanes) {
    const Vec shift = I::load(scratch.column_maxima + j);
    Vec sum = I::zero();
    for (int64_t i = 0; i < rows; ++i) {
      sum = I::add(sum, exp_any<I>(I::subtract(I::load(scratch.tile + i * tile_rows + j), shift)));
    }
    I::store(scratch.column_sums + j, sum);
  }
  for (int64_t j = 0; j < columns; ++j) terms.sums[tile.column_begin + j] += scratch.column_sums[j];
}

template <class I>
void add_sums(const LseCall& call, const Side& anchors, const Side& keys, bool bounded, const Kept& kept,
              const LseWorkspace& work, const Tile& tile, const Scratch& scratch) {
  const Relation& relation = work.tiles.relation;
  if (kept.powers) {
    add_sums_plain<I, true, true>(anchors, keys, call.dim, relation, tile, scratch, work.terms,
                                  kept.tile(tile.task), kept.block_rows);
  } else if (bounded && call.symmetric) {
    add_sums_plain<I, true, false>(anchors, keys, call.dim, relation, tile, scratch, work.terms, nullptr, 0);
  } else if (bounded) {
    add_sums_plain<I, false, false>(anchors, keys, call.dim, relation, tile, scratch, work.terms, nullptr, 0);
  } else {
    store_scores<I>(anchors, keys, call.dim, relation, tile, scratch);
    add_row_sums_online<I>(work.terms, tile, scratch);
    if (call.symmetric) add_column_sums_online<I>(work.terms, tile, scratch);
  }
}

template <class I>
void lse_forward(const LseCall& call) {
  LseWorkspace work = take_lse_workspace<I>(call);
  Side& anchors = work.tiles.anchors;
  Side& keys = call.symmetric ? anchors : work.tiles.keys;
  const bool bounded = prepare_sides<I>(call, anchors, keys, work.tiles.relation);
  const Kept kept = kept_of<I>(call, anchors, bounded);
  for (int64_t row = 0; row < anchors.packed.padded; ++row) {
    work.terms.sums[row] = 0;
    work.terms.maxima[row] = bounded ? 0 : lowest;
  }
  for_each_tile<I>(call, work.tiles, true, false, [&](const Tile& tile, const Scratch& scratch, int) {
    add_sums<I>(call, anchors, keys, bounded, kept, work, tile, scratch);
  });
  if (anchors.packed.index) {
    for (int64_t row = 0; row < call.anchors.rows; ++row) call.lse[row] = 0;
  }
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    const double sum = work.terms.sums[row];
    call.lse[anchors.packed.original(row)] =
        static_cast<float>(sum == 0 ? -INFINITY : work.terms.maxima[row] + std::log(sum));
  }
}

// ------------------------------------------------------------------------------------------ backward

// scratch.tile[i, j] = w_i 2^s + w_j 2^s, or (online) w_i e^(s − lse_i) + w_j e^(s − lse_j), the parts of
// columns only if Symmetric; 0 beyond the valid rows and columns and where blocks are masked.
template <class I, bool Symmetric, bool Online>
void store_weights(const Side& anchors, const Side& keys, int64_t dim, const Relation& relation, const Tile& tile,
                   const Scratch& scratch, const LseTerms& terms) {
  using Vec = typename I::Vec;
  const auto turn_into_weights = [&](int64_t row, int64_t column, float* block) {
    AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
      const Vec row_weight = I::broadcast(terms.weights + tile.row_begin + row + r);
      const Vec row_lse = I::broadcast(terms.lse + tile.row_begin + row + r);
      AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
        const int64_t j = tile.column_begin + column + v * I::lanes;
        float* place = block + r * tile_rows + v * I::lanes;
        const Vec score = I::load(place);
        Vec weight;
        if (!Online) {
          weight = Symmetric ? I::add(row_weight, I::load(terms.weights + j)) : row_weight;
          weight = I::multiply(weight, exp2_bounded<I>(score));
        } else {
          weight = I::multiply(row_weight, exp_any<I>(I::subtract(score, row_lse)));
          if (Symmetric) {
            const Vec p = exp_any<I>(I::subtract(score, I::load(terms.lse + j)));
            weight = I::fma(I::load(terms.weights + j), p, weight);
          }
        }
        I::store(place, weight);
      }
    }
  };
  for_each_score_block<I, true>(anchors, keys, dim, relation, tile, Online ? lowest : masked_if_bounded, scratch.tile,
                                turn_into_weights);
}

// The same from the powers that the forward pass kept; what it did not compute (on and below the diagonal)
// is anything.
template <class I>
void store_kept_weights(const LseTerms& terms, const Kept& kept, const Tile& tile, const Scratch& scratch) {
  const float* powers = kept.tile(tile.task);
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; ++i, powers += kept.block_rows) {
    const typename I::Vec row_weight = I::broadcast(terms.weights + tile.row_begin + i);
    for (int64_t j = 0; j < tile.column_end - tile.column_begin; j += I::lanes) {
      const typename I::Vec weight = I::add(row_weight, I::load(terms.weights + tile.column_begin + j));
      I::store(scratch.tile + i * tile_rows + j, I::multiply(weight, I::load(powers + j)));
    }
  }
}

template <class I>
void store_weights_of(const LseCall& call, const Side& anchors, const Side& keys, bool bounded, const Kept& kept,
                      const LseWorkspace& work, const Tile& tile, const Scratch& scratch) {
  const Relation& relation = work.tiles.relation;
  if (kept.powers) {
    store_kept_weights<I>(work.terms, kept, tile, scratch);
  } else if (bounded && call.symmetric) {
    store_weights<I, true, false>(anchors, keys, call.dim, relation, tile, scratch, work.terms);
  } else if (bounded) {
    store_weights<I, false, false>(anchors, keys, call.dim, relation, tile, scratch, work.terms);
  } else if (call.symmetric) {
    store_weights<I, true, true>(anchors, keys, call.dim, relation, tile, scratch, work.terms);
  } else {
    store_weights<I, false, true>(anchors, keys, call.dim, relation, tile, scratch, work.terms);
  }
}

inline void set_weights(const LseCall& call, const Side& side, bool bounded, const LseTerms& terms) {
  for (int64_t row = 0; row < side.packed.padded; ++row) terms.weights[row] = terms.lse[row] = 0;
  for (int64_t row = 0; row < side.packed.valid; ++row) {
    const int64_t original = side.packed.original(row);
    const double lse = call.saved_lse[original];
    if (lse == -INFINITY) continue;  // no key: nothing to pull on
    const double weight = call.scale * call.grad_lse[original];
    terms.weights[row] = static_cast<float>(bounded ? weight * std::exp(-lse) : weight);
    terms.lse[row] = call.saved_lse[original];
  }
}

template <class I>
void lse_backward(const LseCall& call) {
  LseWorkspace work = take_lse_workspace<I>(call);
  Side& anchors = work.tiles.anchors;
  Side& keys = call.symmetric ? anchors : work.tiles.keys;
  float* const panels = anchors.packed.panels;
  if (is_kept<I>(call)) anchors.packed.panels = nullptr;  // no scores to compute, so nothing to pack for them
  const bool bounded = prepare_sides<I>(call, anchors, keys, work.tiles.relation);
  const Kept kept = kept_of<I>(call, anchors, bounded);
  if (anchors.packed.panels != panels && !kept.powers) {  // of other tiles, or for other weights: computed after all
    anchors.packed.panels = panels;
    pack_rows<I>(anchors.rows, anchors.packed, call.dim, anchors.factor, call.threads);
  }
  set_weights(call, anchors, bounded, work.terms);
  if (call.grad_anchors) start_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) start_gradient(call, keys, call.grad_keys);
  for_each_tile<I>(call, work.tiles, anchors.gradient, keys.gradient,
                   [&](const Tile& tile, const Scratch& scratch, int) {
                     store_weights_of<I>(call, anchors, keys, bounded, kept, work, tile, scratch);
                     add_weighted_features<I>(call, anchors, keys, tile, scratch);
                   });
  if (call.grad_anchors) finish_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) finish_gradient(call, keys, call.grad_keys);
}

template <class I>
int64_t lse_workspace(const LseCall& call) {
  LseCall counting = call;
  counting.workspace = nullptr;
  return take_lse_workspace<I>(counting).bytes;
}

}  // namespace

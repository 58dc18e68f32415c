// pairwise_lse, forward and backward, for any instruction set I (vector_*.h).
//
// Where twice the bound scale · log2(e) · max‖anchor‖ · max‖key‖ is at most 126, the powers and the sums of
// them stay within the exponents of float32 whatever the data are, so no maximum is subtracted ("plain");
// panels then hold scale · log2(e) · keys, and scores are exponents of 2. Elsewhere each row has a running
// maximum ("online"), panels hold scale · keys and scores are exponents of e: large scores then differ from
// the returned log-sum-exp by exactly what they should, where a change of units would round both.
// Symmetric calls use each score for (i, j) and for (j, i).
#pragma once

#include <cmath>
#include <new>

#include "kernels.h"
#include "pack.h"
#include "schedule.h"

namespace {

using action_kernels::LseCall;

constexpr double log2_e = 1.4426950408889634;

// Row blocks that a side is cut into at least, if it has the rows: enough that four threads find work.
// The same number for one to four threads keeps results the same, bit for bit.
constexpr int64_t least_blocks = 16;

// What a thread needs to itself.
struct Scratch {
  float* tile;         // tile_rows × tile_rows scores or weights
  float* row_words;    // the same weights in words of neighbouring columns, where a word is not a float
  float* column_words; // and of neighbouring rows
  float* row_lanes;    // tile_rows × lanes: row sums before their lanes are added up
  float* column_sums;  // tile_rows
  float* column_maxima;
};

// A side (anchors or keys) of a call: packed rows, blocks of them, and what is kept for each row.
struct Side {
  ak_rows rows;
  PackedRows packed;
  int64_t block_rows = 0;
  int64_t blocks = 0;
  Turn* turns = nullptr;
  float factor = 1;  // of scores with these rows as keys
  // Forward: log-sum-exp is maxima + log(sums).
  double* sums = nullptr;
  float* maxima = nullptr;
  // Backward: weights are scale · grad_lse · e^−lse (plain), or scale · grad_lse beside lse (online).
  float* weights = nullptr;
  float* lse = nullptr;
  float* gradient = nullptr;  // NULL if not wanted; rows in their original places

  int64_t begin(int64_t block) const { return block * block_rows; }
  int64_t padded_end(int64_t block) const {
    const int64_t end = begin(block) + block_rows;
    return end < packed.padded ? end : packed.padded;
  }
};

// The part of the score matrix that a task works on; ends are in padded rows.
struct Tile {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  bool diagonal;
  int64_t task;
};

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

struct Workspace {
  Side anchors;
  Side keys;
  float* tiles = nullptr;  // Scratch of all threads
  int64_t scratch_floats = 0;
  int64_t bytes = 0;
};

template <class I>
Side take_side(Arena& arena, const LseCall& call, const ak_rows& rows, Uses uses, bool has_lse,
               bool has_gradient) {
  Side side;
  side.rows = rows;
  side.packed = take_packed_rows<I>(arena, rows, call.dim, uses);
  side.turns = arena.take<Turn>(side.packed.capacity / Blocking<I>::panel);
  if (has_lse && call.pass == AK_FORWARD) {
    side.sums = arena.take<double>(side.packed.capacity);
    side.maxima = arena.take<float>(side.packed.capacity);
  }
  if (has_lse && call.pass != AK_FORWARD) {
    side.weights = arena.take<float>(side.packed.capacity);
    side.lse = arena.take<float>(side.packed.capacity);
  }
  // float32 gradients are summed where they are returned, others here.
  if (has_gradient && rows.dtype != AK_FLOAT32) side.gradient = arena.take<float>(rows.rows * call.dim);
  return side;
}

// Lays out the workspace; with call.workspace NULL only its size is right.
template <class I>
Workspace take_workspace(const LseCall& call) {
  Arena arena(call.workspace);
  Workspace work;
  const bool grad_anchors = call.pass & AK_GRAD_ANCHORS, grad_keys = call.pass & AK_GRAD_KEYS;
  // Anchors are the scores' rows and features of the keys' gradient; keys are the scores' columns and
  // features of the anchors' gradient. In a symmetric call one side is both.
  if (call.symmetric) {
    work.anchors = take_side<I>(arena, call, call.anchors, {true, true, grad_anchors}, true, grad_anchors);
  } else {
    work.anchors = take_side<I>(arena, call, call.anchors, {true, false, grad_keys}, true, grad_anchors);
    work.keys = take_side<I>(arena, call, call.keys, {false, true, grad_anchors}, false, grad_keys);
  }
  work.scratch_floats = tile_rows * (tile_rows + I::lanes + 2) + (I::depth > 1 ? tile_rows * tile_rows : 0);
  work.tiles = arena.take<float>(work.scratch_floats * call.threads);
  work.bytes = arena.bytes();
  return work;
}

template <class I>
Scratch scratch_of(const Workspace& work, int thread) {
  Scratch scratch;
  scratch.tile = work.tiles + thread * work.scratch_floats;
  scratch.row_lanes = scratch.tile + tile_rows * tile_rows;
  scratch.column_sums = scratch.row_lanes + tile_rows * I::lanes;
  scratch.column_maxima = scratch.column_sums + tile_rows;
  scratch.row_words = scratch.column_maxima + tile_rows;
  scratch.column_words = scratch.row_words + tile_rows * tile_rows / 2;
  return scratch;
}

// Sets block_rows and blocks of a side of `padded` rows.
template <class I>
void cut_into_blocks(Side& side, int64_t padded, int threads) {
  constexpr int64_t panel = Blocking<I>::panel;
  const int64_t panels = padded / panel;
  const int64_t wanted = 4 * threads > least_blocks ? 4 * threads : least_blocks;
  int64_t block_panels = (panels + wanted - 1) / wanted;
  if (block_panels > tile_rows / panel) block_panels = tile_rows / panel;
  if (block_panels < 1) block_panels = 1;
  side.block_rows = block_panels * panel;
  side.blocks = (panels + block_panels - 1) / block_panels;
}

// Packs a side and cuts it into blocks.
template <class I>
void prepare_side(Side& side, int64_t dim, double factor, int threads) {
  side.factor = static_cast<float>(factor);
  pack_rows<I>(side.rows, side.packed, dim, side.factor, threads);
  cut_into_blocks<I>(side, side.packed.padded, threads);
  for (int64_t block = 0; block < side.blocks; ++block) new (side.turns + block) Turn();
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
bool prepare_sides(const LseCall& call, Side& anchors, Side& keys) {
  const double to_base_2 = call.scale * log2_e;
  prepare_side<I>(anchors, call.dim, to_base_2, call.threads);
  if (!call.symmetric) prepare_side<I>(keys, call.dim, to_base_2, call.threads);
  const double norms = std::sqrt(largest_squared_norm<I>(anchors.packed)) *
                       std::sqrt(largest_squared_norm<I>(keys.packed));
  const bool bounded = 2 * to_base_2 * norms <= 126.0 && weights_are_bounded(call, anchors.packed);
  if (!bounded) {
    keys.factor = static_cast<float>(call.scale);
    if (I::depth == 1) pack_rows<I>(keys.rows, keys.packed, call.dim, keys.factor, call.threads);
  }
  return bounded;
}

// Bytes that the tiles of a call need, 0 if they are not kept: keys of their own, products of bfloat16 (cheap
// to compute again), too few columns, too many rows. Fewer rows (a mask) do not need more.
template <class I>
int64_t lse_kept(const LseCall& call) {
  if (!call.symmetric || I::depth > 1 || call.dim < Kept::least_dim) return 0;
  Side side;
  cut_into_blocks<I>(side, round_up_to_panel<I>(call.anchors.rows), call.threads);
  const int64_t floats = PairSchedule(side.blocks).tasks() * side.block_rows * side.block_rows;
  const int64_t bytes = (Kept::header_floats + floats) * static_cast<int64_t>(sizeof(float));
  return floats == 0 || bytes > Kept::largest_bytes ? 0 : bytes;
}

// The kept tiles of a call; without any, powers is NULL. A forward pass fills in the header, a backward pass
// compares it.
template <class I>
Kept kept_of(const LseCall& call, const Side& side, bool bounded) {
  Kept kept;
  if (!call.kept) return kept;
  const Kept::Header header = {100 * Blocking<I>::panel + I::lanes, side.block_rows, side.packed.padded};
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

// body(tile, scratch) for every tile, with the sole right to change what belongs to its rows if
// `writes_rows` and to its columns if `writes_columns`.
template <class I, class Schedule, class Body>
void for_each_tile(const Schedule& schedule, const Workspace& work, const Side& rows, const Side& columns,
                   bool writes_rows, bool writes_columns, int threads, const Body& body) {
  const bool symmetric = &rows == &columns;
  WorkQueue queue(schedule.tasks());
  parallel(threads, [&](int thread) {
    const Scratch scratch = scratch_of<I>(work, thread);
    for (int64_t k = queue.take(); k >= 0; k = queue.take()) {
      const Task task = schedule.task(k);
      const bool diagonal = symmetric && task.row_block == task.column_block;
      const Tile tile = {rows.begin(task.row_block), rows.padded_end(task.row_block),
                         columns.begin(task.column_block), columns.padded_end(task.column_block), diagonal, k};
      Turn& row_turn = rows.turns[task.row_block];
      Turn& column_turn = columns.turns[task.column_block];
      const bool waits_for_column = writes_columns && !diagonal;
      if (writes_rows) row_turn.wait_for(task.row_turn);
      if (waits_for_column) column_turn.wait_for(task.column_turn);
      body(tile, scratch);
      if (writes_rows) row_turn.pass_on();
      if (waits_for_column) column_turn.pass_on();
    }
  });
}

// ------------------------------------------------------------------------------------------ scores

// Sets scores beyond the valid rows and columns, and on and below the diagonal of a diagonal tile, to
// `masked`, whose power of two is 0.
template <class I>
AK_NOINLINE void mask_scores(float* scores, int64_t stride, int64_t row, int64_t column, int64_t rows_valid,
                             int64_t columns_valid, bool diagonal, float masked) {
  for (int64_t r = 0; r < I::score_rows; ++r) {
    for (int64_t c = 0; c < Blocking<I>::panel; ++c) {
      const bool counts = row + r < rows_valid && column + c < columns_valid;
      if (!counts || (diagonal && column + c <= row + r)) scores[r * stride + c] = masked;
    }
  }
}

// use(row, column, scores) for every block of scores of the tile that reaches above the diagonal, panel by
// panel; row and column count from the tile's first. `scores` points to the block's score_rows × panel
// scores: in `block` at its place in a tile if InPlace, else always at the start of `block`, densely.
template <class I, bool InPlace, class Use>
AK_INLINE void for_each_score_block(const Side& anchors, const Side& keys, int64_t dim, const Tile& tile,
                                    float masked, float* block, const Use& use) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  constexpr int64_t stride = InPlace ? tile_rows : panel;
  const int64_t slice_stride = anchors.packed.capacity * slice, words = words_of<I>(dim);
  for (int64_t column = tile.column_begin; column < tile.column_end; column += panel) {
    const float* panel_keys = keys.packed.panels + column * words;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += I::score_rows) {
      if (tile.diagonal && row >= column + panel - 1) break;
      const int64_t tile_row = row - tile.row_begin, tile_column = column - tile.column_begin;
      float* scores = InPlace ? block + tile_row * tile_rows + tile_column : block;
      score_block<I>(anchors.packed.slices + row * slice, slice_stride, panel_keys, words, keys.factor, scores,
                     stride);
      const bool at_edge = row + I::score_rows > anchors.packed.valid || column + panel > keys.packed.valid;
      if (at_edge || (tile.diagonal && row + I::score_rows > column)) {
        mask_scores<I>(scores, stride, row, column, anchors.packed.valid, keys.packed.valid, tile.diagonal,
                       masked);
      }
      use(tile_row, tile_column, scores);
    }
  }
}

// ------------------------------------------------------------------------------------------ forward

// Adds Σ 2^score of the tile to the sums of its rows and, if Symmetric, of its columns. If Keep, the powers
// are written to `kept`, whose rows lie `kept_stride` apart.
template <class I, bool Symmetric, bool Keep>
void add_sums_plain(const Side& anchors, const Side& keys, int64_t dim, const Tile& tile, const Scratch& scratch,
                    float* kept, int64_t kept_stride) {
  using Vec = typename I::Vec;
  constexpr int64_t panel = Blocking<I>::panel;
  const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < rows; ++i) I::store(scratch.row_lanes + i * I::lanes, I::zero());
  for (int64_t j = 0; j < columns; ++j) scratch.column_sums[j] = 0;
  for_each_score_block<I, false>(
      anchors, keys, dim, tile, masked_if_bounded, scratch.tile,
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
    anchors.sums[tile.row_begin + i] += sum_of_lanes<I>(I::load(scratch.row_lanes + i * I::lanes));
  }
  if (!Symmetric) return;
  for (int64_t j = 0; j < columns; ++j) keys.sums[tile.column_begin + j] += scratch.column_sums[j];
}

// Writes the tile's scores to scratch.tile, `lowest` where there is none.
template <class I>
void store_scores(const Side& anchors, const Side& keys, int64_t dim, const Tile& tile, const Scratch& scratch) {
  if (tile.diagonal) {  // blocks below the diagonal are not computed
    for (int64_t i = 0; i < tile_rows * tile_rows; ++i) scratch.tile[i] = lowest;
  }
  for_each_score_block<I, true>(anchors, keys, dim, tile, lowest, scratch.tile, [](int64_t, int64_t, float*) {});
}

// Brings a row's sum from its maximum so far to the larger of that and `maximum`, which is returned; adds
// nothing yet. While a row has met no score its sum is 0 and its maximum `lowest`.
inline float raise_maximum(const Side& side, int64_t row, float maximum) {
  const float before = side.maxima[row];
  if (!(maximum > before)) return before;
  side.sums[row] *= std::exp(static_cast<double>(before) - maximum);
  side.maxima[row] = maximum;
  return maximum;
}

// Scores minus this: a difference of two `lowest` must give 0 as its power, not 1.
inline float shift_of(float maximum) { return maximum == lowest ? 0.0f : maximum; }

template <class I>
void add_row_sums_online(const Side& anchors, const Tile& tile, const Scratch& scratch) {
  using Vec = typename I::Vec;
  const int64_t columns = tile.column_end - tile.column_begin;
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; ++i) {
    const float* scores = scratch.tile + i * tile_rows;
    float maximum = lowest;
    for (int64_t j = 0; j < columns; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
    const Vec shift = I::set(shift_of(raise_maximum(anchors, tile.row_begin + i, maximum)));
    Vec sum = I::zero();
    for (int64_t j = 0; j < columns; j += I::lanes) {
      sum = I::add(sum, exp_any<I>(I::subtract(I::load(scores + j), shift)));
    }
    anchors.sums[tile.row_begin + i] += sum_of_lanes<I>(sum);
  }
}

template <class I>
void add_column_sums_online(const Side& keys, const Tile& tile, const Scratch& scratch) {
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
    scratch.column_maxima[j] = shift_of(raise_maximum(keys, tile.column_begin + j, scratch.column_maxima[j]));
  }
  for (int64_t j = 0; j < columns; j += I::lanes) {
    const Vec shift = I::load(scratch.column_maxima + j);
    Vec sum = I::zero();
    for (int64_t i = 0; i < rows; ++i) {
      sum = I::add(sum, exp_any<I>(I::subtract(I::load(scratch.tile + i * tile_rows + j), shift)));
    }
    I::store(scratch.column_sums + j, sum);
  }
  for (int64_t j = 0; j < columns; ++j) keys.sums[tile.column_begin + j] += scratch.column_sums[j];
}

template <class I>
void add_sums(const LseCall& call, const Side& anchors, const Side& keys, bool bounded, const Kept& kept,
              const Tile& tile, const Scratch& scratch) {
  if (kept.powers) {
    add_sums_plain<I, true, true>(anchors, keys, call.dim, tile, scratch, kept.tile(tile.task), kept.block_rows);
  } else if (bounded && call.symmetric) {
    add_sums_plain<I, true, false>(anchors, keys, call.dim, tile, scratch, nullptr, 0);
  } else if (bounded) {
    add_sums_plain<I, false, false>(anchors, keys, call.dim, tile, scratch, nullptr, 0);
  } else {
    store_scores<I>(anchors, keys, call.dim, tile, scratch);
    add_row_sums_online<I>(anchors, tile, scratch);
    if (call.symmetric) add_column_sums_online<I>(keys, tile, scratch);
  }
}

template <class I>
void lse_forward(const LseCall& call) {
  Workspace work = take_workspace<I>(call);
  Side& anchors = work.anchors;
  Side& keys = call.symmetric ? anchors : work.keys;
  const bool bounded = prepare_sides<I>(call, anchors, keys);
  const Kept kept = kept_of<I>(call, anchors, bounded);
  for (int64_t row = 0; row < anchors.packed.padded; ++row) {
    anchors.sums[row] = 0;
    anchors.maxima[row] = bounded ? 0 : lowest;
  }
  const auto body = [&](const Tile& tile, const Scratch& scratch) {
    add_sums<I>(call, anchors, keys, bounded, kept, tile, scratch);
  };
  if (call.symmetric) {
    for_each_tile<I>(PairSchedule(anchors.blocks), work, anchors, anchors, true, true, call.threads, body);
  } else {
    for_each_tile<I>(GridSchedule(anchors.blocks, keys.blocks), work, anchors, keys, true, false, call.threads,
                     body);
  }
  if (call.anchors.mask) {
    for (int64_t row = 0; row < call.anchors.rows; ++row) call.lse[row] = 0;
  }
  for (int64_t row = 0; row < anchors.packed.valid; ++row) {
    const double sum = anchors.sums[row];
    call.lse[anchors.packed.original(row)] =
        static_cast<float>(sum == 0 ? -INFINITY : anchors.maxima[row] + std::log(sum));
  }
}

// ------------------------------------------------------------------------------------------ backward

// scratch.tile[i, j] = w_i 2^s + w_j 2^s, or (online) w_i e^(s − lse_i) + w_j e^(s − lse_j), the parts of
// columns only if Symmetric; 0 beyond the valid rows and columns and where blocks are masked.
template <class I, bool Symmetric, bool Online>
void store_weights(const Side& anchors, const Side& keys, int64_t dim, const Tile& tile, const Scratch& scratch) {
  using Vec = typename I::Vec;
  const auto turn_into_weights = [&](int64_t row, int64_t column, float* block) {
    AK_UNROLL for (int r = 0; r < I::score_rows; ++r) {
      const Vec row_weight = I::broadcast(anchors.weights + tile.row_begin + row + r);
      const Vec row_lse = I::broadcast(anchors.lse + tile.row_begin + row + r);
      AK_UNROLL for (int v = 0; v < I::score_vectors; ++v) {
        const int64_t j = tile.column_begin + column + v * I::lanes;
        float* place = block + r * tile_rows + v * I::lanes;
        const Vec score = I::load(place);
        Vec weight;
        if (!Online) {
          weight = Symmetric ? I::add(row_weight, I::load(keys.weights + j)) : row_weight;
          weight = I::multiply(weight, exp2_bounded<I>(score));
        } else {
          weight = I::multiply(row_weight, exp_any<I>(I::subtract(score, row_lse)));
          if (Symmetric) {
            const Vec p = exp_any<I>(I::subtract(score, I::load(keys.lse + j)));
            weight = I::fma(I::load(keys.weights + j), p, weight);
          }
        }
        I::store(place, weight);
      }
    }
  };
  for_each_score_block<I, true>(anchors, keys, dim, tile, Online ? lowest : masked_if_bounded, scratch.tile,
                                turn_into_weights);
}

// The same from the powers that the forward pass kept; what it did not compute (on and below the diagonal)
// is anything.
template <class I>
void store_kept_weights(const Side& side, const Kept& kept, const Tile& tile, const Scratch& scratch) {
  const float* powers = kept.tile(tile.task);
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; ++i, powers += kept.block_rows) {
    const typename I::Vec row_weight = I::broadcast(side.weights + tile.row_begin + i);
    for (int64_t j = 0; j < tile.column_end - tile.column_begin; j += I::lanes) {
      const typename I::Vec weight = I::add(row_weight, I::load(side.weights + tile.column_begin + j));
      I::store(scratch.tile + i * tile_rows + j, I::multiply(weight, I::load(powers + j)));
    }
  }
}

// Copies what is above the diagonal of a diagonal tile below it.
inline void mirror(float* tile, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    tile[i * tile_rows + i] = 0;
    for (int64_t j = 0; j < i; ++j) tile[i * tile_rows + j] = tile[j * tile_rows + i];
  }
}

// The tile's weights in words: `row_words` pairs neighbouring columns, `column_words` neighbouring rows.
template <class I>
void store_weight_words(const Tile& tile, const Scratch& scratch) {
  constexpr int64_t row_words = words_of<I>(tile_rows);
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; i += I::depth) {
    const float* first = scratch.tile + i * tile_rows;
    const float* second = first + tile_rows;
    for (int64_t j = 0; j < tile.column_end - tile.column_begin; j += I::depth * I::lanes) {
      I::store(scratch.row_words + i * row_words + j / I::depth, I::pair_neighbours(first + j));
      I::store(scratch.row_words + (i + 1) * row_words + j / I::depth, I::pair_neighbours(second + j));
      for (int64_t k = j; k < j + I::depth * I::lanes; k += I::lanes) {
        I::store(scratch.column_words + i / I::depth * tile_rows + k, I::pair(I::load(first + k), I::load(second + k)));
      }
    }
  }
}

// Gradient of rows `out_begin` … `out_end` of `out` += weights (or weightsᵀ) · features of rows
// `in_begin` … `in_end` of `in`, for one slice of columns.
template <class I, bool Transposed, int Vectors>
void add_product_slice(const float* weights, const Side& out, int64_t out_begin, int64_t out_end, const Side& in,
                       int64_t in_begin, int64_t in_end, int64_t dim, int64_t first_column) {
  const int64_t columns = dim - first_column < Vectors * I::lanes ? dim - first_column : Vectors * I::lanes;
  const float* features =
      in.packed.features + (first_column * in.packed.capacity + in_begin * Blocking<I>::slice) / I::depth;
  for (int64_t row = out_begin; row < out_end; row += I::product_rows) {
    const int64_t rows = out_end - row < I::product_rows ? out_end - row : I::product_rows;
    float* out_rows[I::product_rows];
    for (int64_t r = 0; r < rows; ++r) out_rows[r] = out.gradient + out.packed.original(row + r) * dim + first_column;
    const float* block = weights + (row - out_begin) * (Transposed ? 1 : words_of<I>(tile_rows));
    product_block<I, Transposed, Vectors>(block, words_of<I>(in_end - in_begin), features, columns, out_rows, rows);
  }
}

// All slices; the last one may need fewer vectors than a full one.
template <class I, bool Transposed, int Vectors = I::product_vectors>
void add_product(const float* weights, const Side& out, int64_t out_begin, int64_t out_end, const Side& in,
                 int64_t in_begin, int64_t in_end, int64_t dim, int64_t first_column = 0) {
  constexpr int64_t slice = Blocking<I>::slice;
  if (out_end > out.packed.valid) out_end = out.packed.valid;
  for (; dim - first_column > (Vectors - 1) * I::lanes; first_column += slice) {
    add_product_slice<I, Transposed, Vectors>(weights, out, out_begin, out_end, in, in_begin, in_end, dim,
                                              first_column);
  }
  if constexpr (Vectors > 1) {
    if (first_column < dim) {
      add_product<I, Transposed, Vectors - 1>(weights, out, out_begin, out_end, in, in_begin, in_end, dim,
                                              first_column);
    }
  }
}

template <class I>
void add_gradients(const LseCall& call, const Side& anchors, const Side& keys, bool bounded, const Kept& kept,
                   const Tile& tile, const Scratch& scratch) {
  if (kept.powers) {
    store_kept_weights<I>(anchors, kept, tile, scratch);
  } else if (bounded && call.symmetric) {
    store_weights<I, true, false>(anchors, keys, call.dim, tile, scratch);
  } else if (bounded) {
    store_weights<I, false, false>(anchors, keys, call.dim, tile, scratch);
  } else if (call.symmetric) {
    store_weights<I, true, true>(anchors, keys, call.dim, tile, scratch);
  } else {
    store_weights<I, false, true>(anchors, keys, call.dim, tile, scratch);
  }
  if (tile.diagonal) mirror(scratch.tile, tile.row_end - tile.row_begin);
  const float *by_row = scratch.tile, *by_column = scratch.tile;
  if constexpr (I::depth > 1) {
    store_weight_words<I>(tile, scratch);
    by_row = scratch.row_words;
    by_column = scratch.column_words;
  }
  if (anchors.gradient) {
    add_product<I, false>(by_row, anchors, tile.row_begin, tile.row_end, keys, tile.column_begin,
                          tile.column_end, call.dim);
  }
  if (keys.gradient && !tile.diagonal) {
    add_product<I, true>(by_column, keys, tile.column_begin, tile.column_end, anchors, tile.row_begin,
                         tile.row_end, call.dim);
  }
}

inline void set_weights(const LseCall& call, Side& side, bool bounded) {
  for (int64_t row = 0; row < side.packed.padded; ++row) side.weights[row] = side.lse[row] = 0;
  for (int64_t row = 0; row < side.packed.valid; ++row) {
    const int64_t original = side.packed.original(row);
    const double lse = call.saved_lse[original];
    if (lse == -INFINITY) continue;  // no key: nothing to pull on
    const double weight = call.scale * call.grad_lse[original];
    side.weights[row] = static_cast<float>(bounded ? weight * std::exp(-lse) : weight);
    side.lse[row] = call.saved_lse[original];
  }
}

// Chooses where the side's gradient is summed, and clears it.
inline void start_gradient(const LseCall& call, Side& side, void* result) {
  if (side.rows.dtype == AK_FLOAT32) side.gradient = static_cast<float*>(result);
  constexpr int64_t rows_a_turn = 64;
  parallel_for(call.threads, (side.rows.rows + rows_a_turn - 1) / rows_a_turn, [&](int64_t turn) {
    const int64_t first = turn * rows_a_turn;
    const int64_t rows = side.rows.rows - first < rows_a_turn ? side.rows.rows - first : rows_a_turn;
    std::memset(side.gradient + first * call.dim, 0, static_cast<size_t>(rows * call.dim) * sizeof(float));
  });
}

inline void finish_gradient(const LseCall& call, const Side& side, void* result) {
  if (side.rows.dtype == AK_FLOAT32) return;
  parallel_for(call.threads, side.rows.rows, [&](int64_t row) {
    store_floats(side.gradient + row * call.dim, call.dim, result, side.rows.dtype, row * call.dim);
  });
}

template <class I>
void lse_backward(const LseCall& call) {
  Workspace work = take_workspace<I>(call);
  Side& anchors = work.anchors;
  Side& keys = call.symmetric ? anchors : work.keys;
  const bool bounded = prepare_sides<I>(call, anchors, keys);
  const Kept kept = kept_of<I>(call, anchors, bounded);
  set_weights(call, anchors, bounded);
  if (call.grad_anchors) start_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) start_gradient(call, keys, call.grad_keys);
  const auto body = [&](const Tile& tile, const Scratch& scratch) {
    add_gradients<I>(call, anchors, keys, bounded, kept, tile, scratch);
  };
  if (call.symmetric) {
    for_each_tile<I>(PairSchedule(anchors.blocks), work, anchors, anchors, true, true, call.threads, body);
  } else {
    for_each_tile<I>(GridSchedule(anchors.blocks, keys.blocks), work, anchors, keys, anchors.gradient != nullptr,
                     keys.gradient != nullptr, call.threads, body);
  }
  if (call.grad_anchors) finish_gradient(call, anchors, call.grad_anchors);
  if (call.grad_keys) finish_gradient(call, keys, call.grad_keys);
}

template <class I>
int64_t lse_workspace(const LseCall& call) {
  LseCall counting = call;
  counting.workspace = nullptr;
  return take_workspace<I>(counting).bytes;
}

}  // namespace

// Tiles of the scores of pairs of rows: packed sides, the tiles' order, blocks of scores, and products of a
// tile's weights with features. What every op on pairs (pairwise_lse.h, pairwise_softplus.h) is made of.
#pragma once

#include <cmath>
#include <new>

#include "kernels.h"
#include "pack.h"
#include "relation.h"
#include "schedule.h"

namespace {

using action_kernels::PairCall;

// Row blocks that a side is cut into at least, if it has the rows and threads are worth their while: enough
// that four threads find work. The same number for one to four threads keeps results the same, bit for bit.
constexpr int64_t least_blocks = 8;

// What a thread needs to itself.
struct Scratch {
  float* tile;         // tile_rows × tile_rows scores or weights
  float* row_words;    // the same weights in words of neighbouring columns, where a word is not a float
  float* column_words; // and of neighbouring rows
  float* row_lanes;    // tile_rows × lanes: row sums before their lanes are added up
  float* column_sums;  // tile_rows
  float* column_maxima;
};

// A side (anchors or keys) of a call: packed rows and blocks of them.
struct Side {
  ak_rows rows;
  PackedRows packed;
  int64_t block_rows = 0;
  int64_t blocks = 0;
  Turn* turns = nullptr;
  float factor = 1;  // of scores with these rows as keys
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

// What every call needs.
struct Workspace {
  Side anchors;
  Side keys;  // unless the call is symmetric
  Relation relation;
  float* tiles = nullptr;  // Scratch of all threads
  int64_t scratch_floats = 0;
};

template <class I>
Side take_side(Arena& arena, const PairCall& call, const ak_rows& rows, Uses uses, bool has_gradient) {
  Side side;
  side.rows = rows;
  side.packed = take_packed_rows<I>(arena, rows, call.dim, uses);
  side.turns = arena.take<Turn>(side.packed.capacity / Blocking<I>::panel);
  // float32 gradients are summed where they are returned, others here.
  if (has_gradient && rows.dtype != AK_FLOAT32) side.gradient = arena.take<float>(rows.rows * call.dim);
  return side;
}

template <class I>
Workspace take_workspace(Arena& arena, const PairCall& call) {
  Workspace work;
  const bool grad_anchors = call.pass & AK_GRAD_ANCHORS, grad_keys = call.pass & AK_GRAD_KEYS;
  // Anchors are the scores' rows and features of the keys' gradient; keys are the scores' columns and
  // features of the anchors' gradient. In a symmetric call one side is both.
  if (call.symmetric) {
    work.anchors = take_side<I>(arena, call, call.anchors, {true, true, grad_anchors}, grad_anchors);
  } else {
    work.anchors = take_side<I>(arena, call, call.anchors, {true, false, grad_keys}, grad_anchors);
    work.keys = take_side<I>(arena, call, call.keys, {false, true, grad_anchors}, grad_keys);
  }
  work.scratch_floats = tile_rows * (tile_rows + I::lanes + 2) + (I::depth > 1 ? tile_rows * tile_rows : 0);
  work.tiles = arena.take<float>(work.scratch_floats * call.threads);
  work.relation.kind = call.relation;
  work.relation.symmetric = call.symmetric;
  if (call.relation != AK_ANY_CLASS) {
    work.relation.first = arena.take<int64_t>(work.anchors.packed.capacity);
    work.relation.last = arena.take<int64_t>(work.anchors.packed.capacity);
  }
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
void cut_into_blocks(const PairCall& call, Side& side, int64_t padded) {
  constexpr int64_t panel = Blocking<I>::panel;
  const int64_t panels = padded / panel;
  const int64_t of_many = call.threads > 4 ? least_blocks / 4 * call.threads : least_blocks;
  const int64_t wanted = call.threads_worth > 1 ? of_many : 1;
  int64_t block_panels = (panels + wanted - 1) / wanted;
  if (block_panels > tile_rows / panel) block_panels = tile_rows / panel;
  if (block_panels < 1) block_panels = 1;
  side.block_rows = block_panels * panel;
  side.blocks = (panels + block_panels - 1) / block_panels;
}

// Packs a side and cuts it into blocks.
template <class I>
void prepare_side(const PairCall& call, Side& side, double factor) {
  side.factor = static_cast<float>(factor);
  pack_rows<I>(side.rows, side.packed, call.dim, side.factor, call.threads);
  cut_into_blocks<I>(call, side, side.packed.padded);
  for (int64_t block = 0; block < side.blocks; ++block) new (side.turns + block) Turn();
}

inline action_kernels::OrderedRows in_order(const Side& side) {
  return {side.rows.labels, side.packed.index, side.packed.valid};
}

// Finds which pairs count, once the sides are packed.
inline void relate(const Side& anchors, const Side& keys, Relation& relation) {
  relation.rows = anchors.packed.valid;
  relation.columns = keys.packed.valid;
  if (relation.kind == AK_ANY_CLASS) return;
  action_kernels::find_runs(in_order(anchors), in_order(keys), relation.first, relation.last);
}

// body(tile, scratch, thread) for every tile of `schedule` in which a pair counts, with the sole right to
// change what belongs to its rows if `writes_rows` and to its columns if `writes_columns`.
template <class I, class Schedule, class Body>
void visit_tiles(const Schedule& schedule, const Workspace& work, const Side& rows, const Side& columns,
                 bool writes_rows, bool writes_columns, int threads, const Body& body) {
  const bool symmetric = &rows == &columns;
  WorkQueue queue(schedule.tasks());
  parallel(threads, [&](int thread) {
    const TileSession<I> session;
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
      if (work.relation.share(tile.row_begin, tile.row_end, tile.column_begin, tile.column_end) != Share::none) {
        body(tile, scratch, thread);
      }
      if (writes_rows) row_turn.pass_on();
      if (waits_for_column) column_turn.pass_on();
    }
  });
}

// The same in the order that suits the call: symmetric calls meet each pair of blocks once.
template <class I, class Body>
void for_each_tile(const PairCall& call, const Workspace& work, bool writes_rows, bool writes_columns,
                   const Body& body) {
  const Side &anchors = work.anchors, &keys = work.keys;
  if (call.symmetric) {
    visit_tiles<I>(PairSchedule(anchors.blocks), work, anchors, anchors, true, true, call.threads, body);
  } else {
    visit_tiles<I>(GridSchedule(anchors.blocks, keys.blocks), work, anchors, keys, writes_rows, writes_columns,
                   call.threads, body);
  }
}

// ------------------------------------------------------------------------------------------ scores

// Sets scores beyond the valid rows and columns, on and below the diagonal of a diagonal tile, and of pairs
// whose classes do not count, to `masked`, whose power is 0.
template <class I>
AK_NOINLINE void mask_scores(float* scores, int64_t stride, int64_t row, int64_t column, const Relation& relation,
                             bool diagonal, float masked) {
  for (int64_t r = 0; r < I::score_rows; ++r) {
    for (int64_t c = 0; c < Blocking<I>::panel; ++c) {
      const bool counts = row + r < relation.rows && column + c < relation.columns &&
                          relation.counts(row + r, column + c);
      if (!counts || (diagonal && column + c <= row + r)) scores[r * stride + c] = masked;
    }
  }
}

// use(row, column, scores) for every block of scores of the tile that reaches above the diagonal, panel by
// panel; row and column count from the tile's first. `scores` points to the block's score_rows × panel
// scores: in `block` at its place in a tile if InPlace, else always at the start of `block`, densely. Pairs that
// do not count have the score `masked`; a block of such alone is met only if InPlace.
template <class I, bool InPlace, class Use>
AK_INLINE void for_each_score_block(const Side& anchors, const Side& keys, int64_t dim, const Relation& relation,
                                    const Tile& tile, float masked, float* block, const Use& use) {
  constexpr int64_t panel = Blocking<I>::panel, slice = Blocking<I>::slice;
  constexpr int64_t stride = InPlace ? tile_rows : panel;
  const int64_t slice_stride = anchors.packed.capacity * slice, words = panel_words<I>(dim);
  for (int64_t column = tile.column_begin; column < tile.column_end; column += panel) {
    const float* panel_keys = keys.packed.panels + column * words;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += I::score_rows) {
      if (tile.diagonal && row >= column + panel - 1) break;
      const int64_t tile_row = row - tile.row_begin, tile_column = column - tile.column_begin;
      float* scores = InPlace ? block + tile_row * tile_rows + tile_column : block;
      const Share share = relation.share(row, row + I::score_rows, column, column + panel);
      if (share != Share::none) {
        score_block<I>(anchors.packed.slices + row * slice, slice_stride, panel_keys, words, keys.factor, scores,
                       stride);
      } else if (!InPlace) {
        continue;
      }
      const bool at_edge = row + I::score_rows > relation.rows || column + panel > relation.columns;
      if (at_edge || share != Share::all || (tile.diagonal && row + I::score_rows > column)) {
        mask_scores<I>(scores, stride, row, column, relation, tile.diagonal, masked);
      }
      use(tile_row, tile_column, scores);
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

// The tile's column_words by its columns: words of four pairs of rows, transposed.
template <class I>
void store_words_by_columns(const Tile& tile, const Scratch& scratch) {
  constexpr int64_t stride = words_of<I>(tile_rows), pairs = 4;
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; i += pairs * I::depth) {
    for (int64_t j = 0; j < tile.column_end - tile.column_begin; j += I::lanes) {
      float words[pairs * I::lanes];
      AK_UNROLL for (int64_t p = 0; p < pairs; ++p) {
        const float* first = scratch.tile + (i + p * I::depth) * tile_rows + j;
        I::store(words + p * I::lanes, I::pair(I::load(first), I::load(first + tile_rows)));
      }
      AK_UNROLL for (int64_t c = 0; c < I::lanes; c += 4)
        transpose_block<false>(words + c, I::lanes, 1, scratch.column_words + (j + c) * stride + i / I::depth, stride);
    }
  }
}

// The tile's weights in words: `row_words` pairs neighbouring columns, `column_words` neighbouring rows, which
// lie by the rows of the tile or, with tiles, by its columns.
template <class I>
void store_weight_words(const Tile& tile, const Scratch& scratch) {
  constexpr int64_t row_words = words_of<I>(tile_rows);
  for (int64_t i = 0; i < tile.row_end - tile.row_begin; i += I::depth) {
    const float* first = scratch.tile + i * tile_rows;
    const float* second = first + tile_rows;
    for (int64_t j = 0; j < tile.column_end - tile.column_begin; j += I::depth * I::lanes) {
      I::store(scratch.row_words + i * row_words + j / I::depth, I::pair_neighbours(first + j));
      I::store(scratch.row_words + (i + 1) * row_words + j / I::depth, I::pair_neighbours(second + j));
      if constexpr (has_tiles<I>) continue;
      for (int64_t k = j; k < j + I::depth * I::lanes; k += I::lanes) {
        I::store(scratch.column_words + i / I::depth * tile_rows + k, I::pair(I::load(first + k), I::load(second + k)));
      }
    }
  }
  if constexpr (has_tiles<I>) store_words_by_columns<I>(tile, scratch);
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

// Adds the tile's weights in `scratch.tile` times features to the gradients that are wanted.
template <class I>
void add_weighted_features(const PairCall& call, const Side& anchors, const Side& keys, const Tile& tile,
                           const Scratch& scratch) {
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
    add_product<I, !has_tiles<I>>(by_column, keys, tile.column_begin, tile.column_end, anchors, tile.row_begin,
                         tile.row_end, call.dim);
  }
}

// Chooses where the side's gradient is summed, and clears it.
inline void start_gradient(const PairCall& call, Side& side, void* result) {
  if (side.rows.dtype == AK_FLOAT32) side.gradient = static_cast<float*>(result);
  constexpr int64_t rows_a_turn = 64;
  parallel_for(call.threads, (side.rows.rows + rows_a_turn - 1) / rows_a_turn, [&](int64_t turn) {
    const int64_t first = turn * rows_a_turn;
    const int64_t rows = side.rows.rows - first < rows_a_turn ? side.rows.rows - first : rows_a_turn;
    std::memset(side.gradient + first * call.dim, 0, static_cast<size_t>(rows * call.dim) * sizeof(float));
  });
}

inline void finish_gradient(const PairCall& call, const Side& side, void* result) {
  if (side.rows.dtype == AK_FLOAT32) return;
  parallel_for(call.threads, side.rows.rows, [&](int64_t row) {
    store_floats(side.gradient + row * call.dim, call.dim, result, side.rows.dtype, row * call.dim);
  });
}

}  // namespace

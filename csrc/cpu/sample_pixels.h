// sample_pixels: uniform draws among the candidates of every class, for any instruction set I.
//
// Pass 1, over the pixels: which are candidates (a byte each), and how many of each class a block holds.
// Pass 2, over the draws: a random rank, by bisection the block that holds it, the pixel by a scan of that
// block. Between them a running sum over the blocks. No lists: what is kept does not depend on the data,
// and what is drawn depends on neither the blocks nor the threads.
#pragma once

#include "kernels.h"
#include "micro_kernels.h"
#include "numbers.h"
#include "parallel.h"

namespace {

using action_kernels::SampleCall;

constexpr int64_t piece_pixels = 64;  // looked at together; blocks are whole pieces
constexpr int64_t cache_line = 64;
constexpr int64_t blocks_a_task = cache_line / 4;  // int32 counts of a line: tasks write to few in common
constexpr int64_t draws_a_task = 256;
constexpr int32_t no_class = -1;

inline int64_t pixel_count(const ak_sampling& sampling) { return sampling.batch * sampling.pixels; }

// Block sizes balance the counts (one a block and class) and the scans (half a block a draw, some sixteen
// pixels in the time of a count): block² ≈ 16 · pixels / samples.
inline int64_t block_pixels(const ak_sampling& sampling) {
  int64_t block = piece_pixels;
  while (block < 4096 && block * block * sampling.samples < 16 * pixel_count(sampling)) block *= 2;
  return block;
}

// How the pixels are cut into blocks, and where the workspace keeps what.
struct SampleLayout {
  explicit SampleLayout(const SampleCall& call)
      : block(block_pixels(call.sampling)),
        blocks((pixel_count(call.sampling) + block - 1) / block),
        counts(aligned(call.workspace)),
        flags(reinterpret_cast<uint8_t*>(counts + call.sampling.classes * blocks)) {}

  static int32_t* aligned(void* workspace) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(workspace) + cache_line - 1;
    return reinterpret_cast<int32_t*>(address / cache_line * cache_line);
  }

  // Candidates of the class in each block; after the running sum those in all blocks before it.
  int32_t* of_class(int64_t class_) const { return counts + class_ * blocks; }

  const int64_t block, blocks;
  int32_t* const counts;  // (classes, blocks)
  uint8_t* const flags;   // (pixels): 1 for a candidate of its class
};

inline int64_t sample_workspace(const SampleCall& call) {
  const int64_t block = block_pixels(call.sampling);
  const int64_t blocks = (pixel_count(call.sampling) + block - 1) / block;
  const int64_t counts = call.sampling.classes * blocks * static_cast<int64_t>(sizeof(int32_t));
  return cache_line + counts + pixel_count(call.sampling);
}

template <class Label>
void load_classes_of(const void* labels, int64_t start, int64_t count, int64_t classes, int32_t* out) {
  const Label* from = static_cast<const Label*>(labels) + start;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t label = from[p];
    out[p] = label >= 0 && label < classes ? static_cast<int32_t>(label) : no_class;
  }
}

// Classes of `count` pixels from `start` on.
inline void load_classes(const ak_sampling& sampling, int64_t start, int64_t count, int32_t* out) {
  switch (sampling.labels_dtype) {
    case AK_INT64: return load_classes_of<int64_t>(sampling.labels, start, count, sampling.classes, out);
    case AK_INT32: return load_classes_of<int32_t>(sampling.labels, start, count, sampling.classes, out);
    case AK_INT16: return load_classes_of<int16_t>(sampling.labels, start, count, sampling.classes, out);
    case AK_INT8: return load_classes_of<int8_t>(sampling.labels, start, count, sampling.classes, out);
    case AK_UINT8: return load_classes_of<uint8_t>(sampling.labels, start, count, sampling.classes, out);
  }
}

// Consecutive pixels of one image, at most piece_pixels.
struct Piece {
  int64_t start;         // in (batch, pixels) order
  int64_t count;
  int64_t scores_start;  // of the first pixel's first class
};

inline Piece piece_from(const ak_sampling& sampling, int64_t start, int64_t end) {
  const int64_t image = start / sampling.pixels, within = start % sampling.pixels;
  int64_t count = end - start < piece_pixels ? end - start : piece_pixels;
  if (sampling.pixels - within < count) count = sampling.pixels - within;
  return {start, count, image * sampling.classes * sampling.pixels + within};
}

// own[p] = probability of pixel p's own class; anything where it has none. From logits it is
// e^(own − largest) / Σ_c e^(logit_c − largest).
template <class I>
void own_probabilities(const ak_sampling& sampling, const Piece& piece, const int32_t* classes, float* own) {
  float line[piece_pixels] = {}, largest[piece_pixels], sums[piece_pixels] = {};
  const auto load_class = [&](int64_t c) {
    load_floats(sampling.scores, sampling.scores_dtype, piece.scores_start + c * sampling.pixels, piece.count, line);
  };
  for (int64_t p = 0; p < piece_pixels; ++p) own[p] = 0, largest[p] = lowest;
  for (int64_t c = 0; c < sampling.classes; ++c) {
    load_class(c);
    for (int64_t p = 0; p < piece_pixels; ++p) own[p] = classes[p] == c ? line[p] : own[p];
    for (int64_t p = 0; p < piece_pixels; p += I::lanes)
      I::store(largest + p, I::at_least(I::load(largest + p), I::load(line + p)));
  }
  if (!sampling.from_logits) return;
  for (int64_t c = 0; c < sampling.classes; ++c) {
    load_class(c);
    for (int64_t p = 0; p < piece_pixels; p += I::lanes) {
      const typename I::Vec power = exp_any<I>(I::subtract(I::load(line + p), I::load(largest + p)));
      I::store(sums + p, I::add(I::load(sums + p), power));
    }
  }
  for (int64_t p = 0; p < piece_pixels; p += I::lanes)
    I::store(own + p, exp_any<I>(I::subtract(I::load(own + p), I::load(largest + p))));
  for (int64_t p = 0; p < piece_pixels; ++p) own[p] /= sums[p];
}

// Flags of a piece's candidates, and their counts.
template <class I>
void count_piece(const SampleCall& call, const SampleLayout& layout, const Piece& piece) {
  const ak_sampling& sampling = call.sampling;
  int32_t classes[piece_pixels] = {};
  uint8_t flags[piece_pixels];
  load_classes(sampling, piece.start, piece.count, classes);
  for (int64_t p = 0; p < piece.count; ++p) flags[p] = classes[p] != no_class;
  if (sampling.mask) {
    for (int64_t p = 0; p < piece.count; ++p) flags[p] &= sampling.mask[piece.start + p] != 0;
  }
  if (sampling.scores) {
    float own[piece_pixels];
    own_probabilities<I>(sampling, piece, classes, own);
    const float threshold = static_cast<float>(sampling.threshold);
    for (int64_t p = 0; p < piece.count; ++p) flags[p] &= own[p] < threshold;
  }
  int32_t* counts = layout.counts + piece.start / layout.block;
  for (int64_t p = 0; p < piece.count; ++p) {  // without a branch: labels are hard to foresee
    layout.flags[piece.start + p] = flags[p];
    counts[(flags[p] ? classes[p] : 0) * layout.blocks] += flags[p];
  }
}

template <class I>
void count_candidates(const SampleCall& call, const SampleLayout& layout) {
  const int64_t tasks = (layout.blocks + blocks_a_task - 1) / blocks_a_task, total = pixel_count(call.sampling);
  parallel_for(call.threads, tasks, [&](int64_t task) {
    const int64_t first = task * blocks_a_task;
    const int64_t last = layout.blocks - first < blocks_a_task ? layout.blocks : first + blocks_a_task;
    for (int64_t c = 0; c < call.sampling.classes; ++c)
      for (int64_t b = first; b < last; ++b) layout.of_class(c)[b] = 0;
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = total - b * layout.block < layout.block ? total : (b + 1) * layout.block;
      for (int64_t start = b * layout.block; start < end;) {
        const Piece piece = piece_from(call.sampling, start, end);
        count_piece<I>(call, layout, piece);
        start += piece.count;
      }
    }
  });
}

inline void sum_over_blocks(const SampleCall& call, const SampleLayout& layout) {
  parallel_for(call.threads, call.sampling.classes, [&](int64_t c) {
    int32_t* counts = layout.of_class(c);
    int32_t before = 0;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int32_t count = counts[b];
      counts[b] = before;
      before += count;
    }
    call.counts[c] = before;
  });
}

// First word of Philox 4×32-10 (Salmon et al., 2011) for a 64-bit key and the counter (counter, 0, 0, 0).
inline uint32_t philox(uint64_t key, uint32_t counter) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = 0xD2511F53ull * c0, product_1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ key_0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ key_1;
    c3 = static_cast<uint32_t>(product_0);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return c0;
}

// The last block with at most `rank` candidates of the class before it: the one that holds the rank.
inline int64_t block_of_rank(const int32_t* before, int64_t blocks, int32_t rank) {
  int64_t low = 0, high = blocks;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (before[middle] <= rank ? low : high) = middle;
  }
  return low;
}

// The pixel of the class's candidate number `rank`, counted from `start`, which lies no further than the
// end of start's block.
inline int64_t scan_for_rank(const SampleCall& call, const SampleLayout& layout, int64_t start, int32_t class_,
                             int32_t rank) {
  const int64_t total = pixel_count(call.sampling);
  for (; start < total; start += piece_pixels) {
    const int64_t count = total - start < piece_pixels ? total - start : piece_pixels;
    int32_t classes[piece_pixels], found = 0;
    load_classes(call.sampling, start, count, classes);
    for (int64_t p = 0; p < count; ++p) found += layout.flags[start + p] & (classes[p] == class_);
    if (rank >= found) {
      rank -= found;
      continue;
    }
    for (int64_t p = 0;; ++p) {
      if ((layout.flags[start + p] & (classes[p] == class_)) && rank-- == 0) return start + p;
    }
  }
  return -1;
}

inline void draw(const SampleCall& call, const SampleLayout& layout) {
  const int64_t draws = call.sampling.classes * call.sampling.samples;
  parallel_for(call.threads, (draws + draws_a_task - 1) / draws_a_task, [&](int64_t task) {
    const int64_t last = draws < (task + 1) * draws_a_task ? draws : (task + 1) * draws_a_task;
    for (int64_t d = task * draws_a_task; d < last; ++d) {
      const int64_t class_ = d / call.sampling.samples;
      const uint64_t count = static_cast<uint64_t>(call.counts[class_]);
      call.index[d] = -1;
      if (count == 0) continue;
      const uint64_t word = philox(call.sampling.seed, static_cast<uint32_t>(d));
      const int32_t rank = static_cast<int32_t>(word * count >> 32);
      const int32_t* before = layout.of_class(class_);
      const int64_t block = block_of_rank(before, layout.blocks, rank);
      call.index[d] = scan_for_rank(call, layout, block * layout.block, static_cast<int32_t>(class_),
                                    rank - before[block]);
    }
  });
}

template <class I>
void sample_pixels(const SampleCall& call) {
  const SampleLayout layout(call);
  count_candidates<I>(call, layout);
  sum_over_blocks(call, layout);
  draw(call, layout);
}

}  // namespace

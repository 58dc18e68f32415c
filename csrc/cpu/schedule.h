// Orders in which tiles are worked on, such that neighbours in the order touch different blocks of rows.
//
// Every task adds to sums or gradients of its row block and its column block. Each block is given to its
// tasks strictly in the order below (`Turn`), so results depend neither on timing nor on which thread
// takes a task; there are no atomics on data, no private copies of gradients and no barriers. Tasks are
// taken in this order too, so the earliest unfinished one can always proceed.
#pragma once

#include <cstdint>

namespace {

struct Task {
  int64_t row_block;
  int64_t column_block;
  int64_t row_turn;  // tasks before this one that touch row_block
  int64_t column_turn;
};

// All unordered pairs {i, j} of `blocks` blocks, i = j included: round r holds the pairs with
// i + j ≡ r (mod blocks), which is every block exactly once. Task p of a round shares its blocks with
// tasks p and p + 1 of the round before, so that threads in step seldom wait.
class PairSchedule {
 public:
  explicit PairSchedule(int64_t blocks) : blocks_(blocks) {}

  int64_t tasks() const { return blocks_ * (blocks_ + 1) / 2; }

  Task task(int64_t k) const {
    const int64_t in_even_round = blocks_ / 2 + 1;
    const int64_t half = k / (blocks_ + 1);  // two rounds, an even and an odd one, hold blocks + 1 tasks
    const int64_t rest = k % (blocks_ + 1);
    const int64_t odd = rest >= in_even_round;
    const int64_t p = odd ? rest - in_even_round : rest;
    const int64_t round = 2 * half + odd;
    return {modulo(half - p), modulo(half + odd + p), round, round};
  }

 private:
  int64_t modulo(int64_t block) const { return (block % blocks_ + blocks_) % blocks_; }
  const int64_t blocks_;
};

// All pairs (row block, column block): in round r the p-th block of the shorter side meets block
// (p + r) mod longer of the longer side (a Latin square).
class GridSchedule {
 public:
  GridSchedule(int64_t row_blocks, int64_t column_blocks)
      : rows_shorter_(row_blocks <= column_blocks),
        shorter_(rows_shorter_ ? row_blocks : column_blocks),
        longer_(rows_shorter_ ? column_blocks : row_blocks) {}

  int64_t tasks() const { return shorter_ * longer_; }

  Task task(int64_t k) const {
    const int64_t round = k / shorter_;
    const int64_t p = k % shorter_;
    const int64_t q = (p + round) % longer_;
    const int64_t q_turn = visits(q, round);
    return rows_shorter_ ? Task{p, q, round, q_turn} : Task{q, p, q_turn, round};
  }

 private:
  // Rounds before `round` in which block q of the longer side takes part: those r with
  // (q − r) mod longer < shorter.
  int64_t visits(int64_t q, int64_t round) const {
    const int64_t first = q - round + 1;  // q − r runs over first … q
    const int64_t plain = overlap(first > 0 ? first : 0, q, 0, shorter_ - 1);
    const int64_t wrapped = overlap(first, -1, -longer_, shorter_ - 1 - longer_);
    return plain + wrapped;
  }

  static int64_t overlap(int64_t low, int64_t high, int64_t other_low, int64_t other_high) {
    const int64_t from = low > other_low ? low : other_low;
    const int64_t to = high < other_high ? high : other_high;
    return to >= from ? to - from + 1 : 0;
  }

  const bool rows_shorter_;
  const int64_t shorter_;
  const int64_t longer_;
};

}  // namespace

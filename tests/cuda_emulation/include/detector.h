// A race detector for the shared memory of one block, by vector clocks: an access is an error unless
// something orders it after the last write (and a write after all reads), whatever the schedule was.
//
// Clocks count per warp; within a warp only a warp-wide barrier orders two lanes. A copy in flight makes
// its destination untouchable until its thread, or the mbarrier it reports to, has been waited for.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "options.h"

namespace emulation {

constexpr int kMostWarps = 32, kMostMbarriers = 64;
constexpr size_t kArenaBytes = 228 << 10;  // an SM's shared memory on sm_90

/// How much of every warp's past is known, and of every mbarrier's phases.
using Clock = std::vector<uint32_t>;

inline void join(Clock &into, const Clock &other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

/// The shared memory of the block that runs.
inline char *arena() {
  static char *memory = static_cast<char *>(aligned_alloc(1 << 20, 1 << 20));
  return memory;
}

class Detector {
 public:
  Detector(int warps, bool enabled) : warps_(warps), enabled_(enabled) {
    if (enabled) cells_.resize(kArenaBytes / 4);
    clocks_.assign(warps, no_time());
    epochs_.assign(warps, 1);
    for (int w = 0; w < warps; ++w) clocks_[w][w] = 1;
  }

  Clock no_time() const { return Clock(warps_ + kMostMbarriers, 0); }
  const Clock &known_to(int warp) const { return clocks_[warp]; }
  void acquire(int warp, const Clock &clock) { join(clocks_[warp], clock); }
  /// What the warp does from here on is not covered by what it released before.
  void advance(int warp) { ++clocks_[warp][warp]; }
  /// The lanes of a warp have met.
  void order_lanes(int warp) { ++epochs_[warp]; }
  size_t entry_of_mbarrier(int number) const { return warps_ + size_t(number); }

  void on_read(int thread, const void *p, size_t bytes, const char *what) {
    if (!enabled_) return;
    const int warp = thread / kWarp;
    for (size_t i = first(p), end = last(p, bytes); i < end; ++i) {
      Cell &cell = cells_[i];
      if (cell.flight >= 0)
        fail("%s: thread %d reads shared[%zu], where a copy of thread %d is in flight (no wait)", what,
             thread, i * 4, cell.flight);
      if (cell.writer == kNobody) fail("%s: thread %d reads shared[%zu] uninitialised", what, thread, i * 4);
      check_order(cell, thread, what, i, "reads");
      cell.read[warp] = clocks_[warp][warp];
    }
  }

  void on_write(int thread, const void *p, size_t bytes, const char *what, bool in_flight) {
    if (!enabled_) return;
    const int warp = thread / kWarp;
    const Clock &known = clocks_[warp];
    for (size_t i = first(p), end = last(p, bytes); i < end; ++i) {
      Cell &cell = cells_[i];
      if (cell.flight >= 0 && cell.flight != thread)
        fail("%s: thread %d writes shared[%zu], where a copy of thread %d is in flight", what, thread,
             i * 4, cell.flight);
      if (cell.writer != kNobody) check_order(cell, thread, what, i, "overwrites");
      for (int w = 0; w < warps_; ++w)
        if (w != warp && cell.read[w] > known[w])
          fail("%s: thread %d overwrites shared[%zu], read by warp %d with no barrier between", what,
               thread, i * 4, w);
      cell.flight = in_flight ? thread : kNoFlight;
      record_writer(cell, thread);
    }
  }

  /// A thread has waited for its own copy.
  void on_arrival(int thread, const void *p, size_t bytes) {
    if (!enabled_) return;
    for (size_t i = first(p), end = last(p, bytes); i < end; ++i) {
      cells_[i].flight = kNoFlight;
      record_writer(cells_[i], thread);
    }
  }

  /// A bulk copy has landed: known to those who have seen the end of its mbarrier's phase.
  void on_landing(int mbarrier, int phase, const void *p, size_t bytes) {
    if (!enabled_) return;
    for (size_t i = first(p), end = last(p, bytes); i < end; ++i) {
      cells_[i].flight = kNoFlight;
      cells_[i].writer = kFirstMbarrier - mbarrier;
      cells_[i].written = uint32_t(phase) + 1;
    }
  }

 private:
  // Writers are threads; below zero nobody, or the bulk copies of an mbarrier.
  static constexpr int kNobody = -1, kFirstMbarrier = -2, kNoFlight = -1;

  struct Cell {  // what is known of 4 bytes
    uint32_t written = 0, writer_epoch = 0;
    int writer = kNobody;
    int flight = kNoFlight;  // thread whose copy is on its way
    uint32_t read[kMostWarps] = {};
  };

  static size_t offset(const void *p) { return size_t(static_cast<const char *>(p) - arena()); }
  static size_t first(const void *p) { return offset(p) / 4; }
  static size_t last(const void *p, size_t bytes) { return (offset(p) + bytes + 3) / 4; }

  void record_writer(Cell &cell, int thread) {
    const int warp = thread / kWarp;
    cell.writer = thread;
    cell.written = clocks_[warp][warp];
    cell.writer_epoch = epochs_[warp];
  }

  void check_order(const Cell &cell, int thread, const char *what, size_t i, const char *verb) const {
    const int warp = thread / kWarp;
    const Clock &known = clocks_[warp];
    if (cell.writer <= kFirstMbarrier) {
      if (cell.written > known[entry_of_mbarrier(kFirstMbarrier - cell.writer)])
        fail("%s: thread %d %s shared[%zu], which a bulk copy wrote, without having waited for its mbarrier",
             what, thread, verb, i * 4);
      return;
    }
    if (cell.writer == thread) return;
    const int writer = cell.writer / kWarp;
    const bool ordered = writer != warp ? cell.written <= known[writer] : cell.writer_epoch != epochs_[warp];
    if (!ordered)
      fail("%s: thread %d %s shared[%zu], written by thread %d with no barrier between", what, thread, verb,
           i * 4, cell.writer);
  }

  int warps_;
  bool enabled_;
  std::vector<Cell> cells_;
  std::vector<Clock> clocks_;
  std::vector<uint32_t> epochs_;
};

}  // namespace emulation

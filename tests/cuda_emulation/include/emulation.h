// Runs CUDA C++ on the CPU. A thread of a block is a fiber, a warp-wide instruction a meeting of its
// lanes, a barrier a meeting of fibers. Blocks run one after another.
//
// What a GPU would get away with by luck is made to fail:
// - fibers are scheduled in random order, with warps that run far ahead (Options::seed);
// - shared memory starts as NaN; asynchronous copies turn their destination to NaN when issued and
//   arrive as late as the program allows, or at a random earlier moment;
// - accesses of shared memory are checked by a race detector (detector.h).
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>

#include "detector.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 256 << 10;

struct Copy {  // cp.async
  char *to;
  const char *from;
  int bytes;
  int valid;  // of `bytes`: come from memory, the rest are 0
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = false;
  int thread = 0, warp = 0, lane = 0;
  uint3 index{};
  const char *waits_for = "";
  std::vector<Copy> open;                // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

/// Lanes that execute one warp-wide instruction.
struct Meeting {
  uint32_t mask, arrived;
  const char *name;
  void *slots[kWarp];
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Barrier {
  int arrived = 0;
  std::vector<Fiber *> sleepers;
  Clock clock;
};

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  int phase = 0, number = 0;
  Clock clock, previous;  // of the phase that gathers, and of the one that has ended
  std::vector<Fiber *> sleepers;
};

struct BulkCopy {
  std::function<void()> act;
  const void *barrier;
  int64_t bytes;
  Clock clock;
};

/// The 128 threads of four warps that execute one instruction.
struct GroupMeeting {
  int arrived = 0;
  std::vector<void *> slots;
  std::vector<Fiber *> sleepers;
};

class Block;
inline Block *block;
inline Fiber *fiber;

class Block {
 public:
  Block(dim3 shape, size_t dynamic_bytes, uint64_t seed, const std::function<void()> &body)
      : detector(warps_of(shape), options.detect_races), body_(body), random_{seed}, shuffled_(seed != 0) {
    if (dynamic_bytes > options.shared_limit()) fail("%zu bytes of shared memory", dynamic_bytes);
    static_bytes_ = dynamic_bytes;
    memset(arena(), 0xff, kArenaBytes);
    alive_ = int(shape.x * shape.y * shape.z);
    fibers.resize(alive_);
    warps_.resize(warps_of(shape));
    for (size_t w = 0; w < warps_.size(); ++w) order_.push_back(int(w));
    for (int t = 0; t < alive_; ++t) start(t, shape);
  }

  void run() {
    block = this;
    if (shuffled_) shuffle();
    constexpr uint32_t kLateness[] = {0, 0, 4096, 256, 32};  // 0: when nothing else can run
    if (shuffled_) lateness_ = kLateness[random_() % 5];
    while (alive_) {
      Fiber *next = pick();
      if (!next) {
        if (deliver_bulk()) continue;
        deadlock();
      }
      fiber = next;
      threadIdx = next->index;
      resume(*next);
      if (failure_) std::rethrow_exception(failure_);
    }
    if (!bulk_.empty()) fail("the block ended with %zu bulk copies in flight", bulk_.size());
    block = nullptr;
  }

  // ---- meetings of lanes, of warps, of four warps ----

  /// The lanes of `mask` meet; the last one acts for all, given what each brought.
  template <typename Act>
  void meet(uint32_t mask, const char *name, void *mine, Act act) {
    Warp &warp = warps_[fiber->warp];
    const uint32_t bit = 1u << fiber->lane;
    if (!(mask & bit)) fail("%s: lane %d is not in its mask %08x", name, fiber->lane, mask);
    Meeting *meeting = meeting_of(warp, mask, name);
    meeting->slots[fiber->lane] = mine;
    meeting->arrived |= bit;
    if (meeting->arrived != mask) return sleep(name);
    const Meeting own = *meeting;
    for (auto &m : warp.meetings)
      if (m.get() == meeting) {
        m = std::move(warp.meetings.back());
        break;
      }
    warp.meetings.pop_back();
    act(const_cast<void **>(own.slots));
    warp.ready |= mask;
  }

  void order_lanes() { detector.order_lanes(fiber->warp); }

  void barrier(int id, int threads) {
    Barrier &b = barriers_[id];
    if (threads % kWarp) fail("barrier %d for %d threads: no multiple of 32", id, threads);
    if (b.clock.empty()) b.clock = detector.no_time();
    join(b.clock, detector.known_to(fiber->warp));
    b.sleepers.push_back(fiber);
    if (++b.arrived < threads) return sleep("barrier");
    std::vector<bool> seen(warps_.size());
    for (Fiber *f : b.sleepers) {
      wake(*f);
      if (seen[f->warp]) continue;
      seen[f->warp] = true;
      detector.acquire(f->warp, b.clock);
      detector.advance(f->warp);
      detector.order_lanes(f->warp);
    }
    b = Barrier{};
  }

  template <typename Act>
  void meet_group(const char *name, void *mine, Act act) {
    GroupMeeting &meeting = group_meetings_[fiber->warp / 4];
    meeting.slots.resize(4 * kWarp);
    meeting.slots[fiber->thread % (4 * kWarp)] = mine;
    meeting.sleepers.push_back(fiber);
    if (++meeting.arrived < 4 * kWarp) return sleep(name);
    const GroupMeeting own = std::move(meeting);
    meeting = GroupMeeting{};
    act(own.slots);
    for (Fiber *f : own.sleepers) wake(*f);
  }

  // ---- shared memory ----

  char *dynamic_shared() { return arena(); }

  void *static_shared(const void *key, size_t bytes, size_t alignment) {
    auto [it, is_new] = statics_.try_emplace(key, nullptr);
    if (is_new) {
      static_bytes_ = (static_bytes_ + alignment - 1) / alignment * alignment;
      it->second = arena() + static_bytes_;
      static_bytes_ += bytes;
      if (static_bytes_ > kArenaBytes) fail("out of shared memory");
    }
    return it->second;
  }

  void check_inside(const void *p, size_t bytes, const char *what) const {
    const auto *c = static_cast<const char *>(p);
    if (c < arena() || c + bytes > arena() + static_bytes_)
      fail("%s: address outside of the block's shared memory (offset %td of %zu)", what, c - arena(),
           static_bytes_);
  }

  void on_read(const void *p, size_t bytes, const char *what) {
    check_inside(p, bytes, what);
    detector.on_read(fiber->thread, p, bytes, what);
  }
  void on_write(const void *p, size_t bytes, const char *what, bool in_flight = false) {
    check_inside(p, bytes, what);
    detector.on_write(fiber->thread, p, bytes, what, in_flight);
  }

  // ---- cp.async ----

  void copy(const Copy &c) {
    ++statistics.copies;
    on_write(c.to, c.bytes, "cp.async", true);
    memset(c.to, 0xff, c.bytes);
    fiber->open.push_back(c);
  }
  void commit_copies() {
    fiber->groups.push_back(std::move(fiber->open));
    fiber->open.clear();
  }
  void wait_copies(size_t most) {
    for (; fiber->groups.size() > most; fiber->groups.pop_front())
      for (const Copy &c : fiber->groups.front()) {
        memcpy(c.to, c.from, c.valid);
        memset(c.to + c.valid, 0, c.bytes - c.valid);
        detector.on_arrival(fiber->thread, c.to, c.bytes);
      }
  }

  // ---- mbarriers and bulk copies ----

  Mbarrier &mbarrier(const void *p) {
    check_inside(p, 8, "mbarrier");
    auto it = mbarriers_.find(p);
    if (it == mbarriers_.end()) fail("thread %d uses an mbarrier that was not initialised", fiber->thread);
    return it->second;
  }
  void mbarrier_init(const void *p, int count) {
    check_inside(p, 8, "mbarrier");
    Mbarrier b;
    b.count = b.pending = count;
    b.clock = b.previous = detector.no_time();
    b.number = int(mbarriers_.size());
    if (b.number >= kMostMbarriers) fail("more than %d mbarriers", kMostMbarriers);
    mbarriers_[p] = b;
  }
  void mbarrier_arrive(const void *p, int64_t bytes) {
    Mbarrier &b = mbarrier(p);
    join(b.clock, detector.known_to(fiber->warp));
    detector.advance(fiber->warp);
    b.bytes += bytes;
    if (--b.pending < 0) fail("more arrivals at an mbarrier than its count of %d", b.count);
    end_phase_if_complete(b);
  }
  void mbarrier_wait(const void *p, int parity) {
    Mbarrier &b = mbarrier(p);
    while ((b.phase & 1) == (parity & 1)) {
      b.sleepers.push_back(fiber);
      sleep("mbarrier");
    }
    detector.acquire(fiber->warp, b.previous);
  }

  /// `land` writes [to, to + bytes) when the copy arrives.
  void bulk_copy(void *to, int64_t bytes, const void *barrier, const char *what, std::function<void()> land) {
    mbarrier(barrier);
    on_write(to, bytes, what, true);
    memset(to, 0xff, bytes);
    ++statistics.copies;
    auto act = [=] {
      land();
      const Mbarrier &b = mbarriers_.at(barrier);
      detector.on_landing(b.number, b.phase, to, bytes);
    };
    bulk_.push_back({act, barrier, bytes, detector.known_to(fiber->warp)});
  }

  std::vector<Fiber> fibers;
  Detector detector;
  std::map<int, std::shared_ptr<void>> group_states;  // of four warps: what asynchronous products keep

 private:
  static int warps_of(dim3 shape) {
    const unsigned threads = shape.x * shape.y * shape.z;
    if (threads < 1 || threads > 1024) fail("a block of %u threads", threads);
    return int(threads + kWarp - 1) / kWarp;
  }

  void start(int t, dim3 shape) {
    Fiber &f = fibers[t];
    f.thread = t, f.warp = t / kWarp, f.lane = t % kWarp;
    f.index = {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)};
    warps_[f.warp].ready |= 1u << f.lane;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stack(t);
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, &Block::enter, 0);
  }

  Meeting *meeting_of(Warp &warp, uint32_t mask, const char *name) {
    Meeting *found = nullptr;
    for (auto &m : warp.meetings)
      if (m->mask & mask) {
        if (m->mask != mask || strcmp(m->name, name))
          fail("warp %d diverges: lane %d at %s (%08x), others at %s (%08x)", fiber->warp, fiber->lane, name,
               mask, m->name, m->mask);
        found = m.get();
      }
    if (found) return found;
    warp.meetings.emplace_back(new Meeting{mask, 0, name, {}});
    return warp.meetings.back().get();
  }

  void sleep(const char *what) {
    Fiber &self = *fiber;
    self.waits_for = what;
    warps_[self.warp].ready &= ~(1u << self.lane);
    leave(self);
    self.waits_for = "";
  }
  void wake(Fiber &f) { warps_[f.warp].ready |= 1u << f.lane; }

  void end_phase_if_complete(Mbarrier &b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.count;
    b.clock[detector.entry_of_mbarrier(b.number)] = b.phase;
    b.previous = b.clock;
    for (Fiber *f : b.sleepers) wake(*f);
    b.sleepers.clear();
  }

  bool deliver_bulk() {
    if (bulk_.empty()) return false;
    const size_t which = shuffled_ ? random_() % bulk_.size() : 0;
    const BulkCopy copy = std::move(bulk_[which]);
    bulk_.erase(bulk_.begin() + long(which));
    copy.act();
    Mbarrier &barrier = mbarriers_.at(copy.barrier);
    join(barrier.clock, copy.clock);
    barrier.bytes -= copy.bytes;
    end_phase_if_complete(barrier);
    return true;
  }

  void shuffle() {
    for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random_() % i]);
  }

  Fiber *pick() {
    if (shuffled_) {
      const uint32_t dice = random_();
      if (dice % 64 == 0) shuffle();
      if (lateness_ && dice / 64 % lateness_ == 0) deliver_bulk();
    }
    for (int w : order_) {
      const uint32_t ready = warps_[w].ready;
      if (!ready) continue;
      const int turn = shuffled_ ? int(random_() % kWarp) : 0;
      const uint32_t turned = turn ? (ready >> turn | ready << (kWarp - turn)) : ready;
      return &fibers[w * kWarp + (__builtin_ctz(turned) + turn) % kWarp];
    }
    return nullptr;
  }

  [[noreturn]] void deadlock() {
    std::string text = "deadlock:";
    int named = 0;
    for (const Fiber &f : fibers)
      if (!f.done && named++ < 4)
        text += " thread " + std::to_string(f.thread) + " waits at " + f.waits_for + ";";
    fail("%s %d threads wait, %zu have ended", text.c_str(), alive_, fibers.size() - alive_);
  }

  // ---- switching between fibers: contexts to start them, jumps (no system call) from then on ----

  static void enter() {
    try {
      block->body_();
      block->wait_copies(0);
    } catch (...) {
      block->failure_ = std::current_exception();
    }
    fiber->done = true;
    --block->alive_;
    block->warps_[fiber->warp].ready &= ~(1u << fiber->lane);
    _longjmp(block->home_, 1);
  }

  __attribute__((noinline)) void resume(Fiber &f) {
    if (_setjmp(home_)) return;
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    setcontext(&f.start);
  }
  __attribute__((noinline)) void leave(Fiber &f) {
    if (!_setjmp(f.here)) _longjmp(home_, 1);
  }

  static char *stack(int thread) {
    static std::vector<char *> stacks;
    while (int(stacks.size()) <= thread)
      stacks.push_back(static_cast<char *>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
    return stacks[thread];
  }

  const std::function<void()> &body_;
  Random random_;
  bool shuffled_;
  uint32_t lateness_ = 0;
  size_t static_bytes_ = 0;
  int alive_ = 0;
  jmp_buf home_;
  std::exception_ptr failure_;
  std::vector<int> order_;  // of the warps
  std::vector<Warp> warps_;
  std::vector<BulkCopy> bulk_;
  std::map<const void *, void *> statics_;
  std::map<int, Barrier> barriers_;
  std::map<const void *, Mbarrier> mbarriers_;
  std::map<int, GroupMeeting> group_meetings_;
};

/// kernel<<<grid, shape, bytes, stream>>>(...) becomes Launch(grid, shape, bytes, stream).run([&] {...})
struct Launch {
  dim3 grid, shape;
  size_t bytes;
  Launch(dim3 grid, dim3 shape, size_t bytes = 0, void * = nullptr) : grid(grid), shape(shape), bytes(bytes) {}

  void run(const std::function<void()> &body) const {
    gridDim = grid, blockDim = shape;
    Random seeds{options.seed};
    try {
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y, z};
            ++statistics.blocks;
            Block(shape, bytes, options.seed ? seeds() | 1 : 0, body).run();
          }
    } catch (const std::exception &error) {
      block = nullptr;
      last_error = error.what();
    }
  }
};

/// The variable that `__shared__ T name` declares: one a block and place in the source.
template <typename T, typename Place>
T &shared_variable(Place) {
  static char key;
  return *static_cast<T *>(block->static_shared(&key, sizeof(T), std::max<size_t>(alignof(T), 16)));
}

}  // namespace emulation

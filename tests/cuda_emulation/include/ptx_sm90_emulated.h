// What the instructions of ptx_sm90.cuh do. Products of warpgroups happen when they are waited for: until
// then their accumulators are NaN, and their operands in shared memory must stay.
#pragma once

#include <set>

#include "ptx_emulated.h"

namespace emulation {

/// The 128-byte swizzle: bits 4-6 of an address ^= bits 7-9.
inline size_t swizzled(size_t address) { return address ^ ((address >> 7 & 7) << 4); }

/// A matrix descriptor's fields, in bytes.
struct Operand {
  size_t start, leading, stride;
  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) * 16),
        leading((descriptor >> 16 & 0x3fff) * 16),
        stride((descriptor >> 32 & 0x3fff) * 16) {}

  /// Element (row, k) of an operand along rows: rows of 128 bytes, groups of 8 rows `stride` apart.
  size_t along(int row, int k) const { return swizzled(start + stride * (row / 8) + row % 8 * 128 + k * 2); }
  /// Element (k, column) of an operand across rows: 8 rows of 64 numbers, `leading` to the next 64
  /// columns, `stride` to the next 8 rows.
  size_t across(int column, int k) const {
    return swizzled(start + leading * (column / 64) + stride * (k / 8) + k % 8 * 128 + column % 64 * 2);
  }
};

/// The queue of a warpgroup's products.
struct GroupProducts {
  struct Operation {
    std::function<void()> act;
    float *accumulators;
    int group;  // of commits
  };
  std::deque<Operation> operations;
  std::map<float *, std::vector<float *>> threads;  // accumulators of thread 0 -> of all 128
  std::map<float *, std::vector<std::vector<float>>> values;
  int group = 0;
  bool fenced = false;

  static GroupProducts &mine() {
    auto &state = block->group_states[fiber->warp / 4];
    if (!state) state = std::make_shared<GroupProducts>();
    return *static_cast<GroupProducts *>(state.get());
  }

  /// Takes the accumulators over until they are waited for.
  void hide(const std::vector<float *> &of_threads, int registers) {
    float *key = of_threads[0];
    if (values.count(key)) return;
    threads[key] = of_threads;
    for (float *d : of_threads) {
      values[key].emplace_back(d, d + registers);
      std::fill_n(d, registers, NAN);
    }
  }

  void wait(int most) {
    while (!operations.empty() && operations.front().group < group - most) {
      operations.front().act();
      operations.pop_front();
    }
    std::set<float *> open;
    for (const auto &operation : operations) open.insert(operation.accumulators);
    for (auto it = values.begin(); it != values.end();) {
      if (open.count(it->first)) {
        ++it;
        continue;
      }
      for (size_t t = 0; t < it->second.size(); ++t)
        std::copy(it->second[t].begin(), it->second[t].end(), threads[it->first][t]);
      it = values.erase(it);
    }
    fenced = false;
  }
};

}  // namespace emulation

namespace ak::ptx {

inline void barrier_init(uint64_t *barrier, int count) { block->mbarrier_init(barrier, count); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t *barrier) { block->mbarrier_arrive(barrier, 0); }
inline void barrier_expect(uint64_t *barrier, int bytes) { block->mbarrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t *barrier, int parity) { block->mbarrier_wait(barrier, parity); }

inline void tensor_copy(void *shared, const CUtensorMap *map, uint64_t *barrier, int column, int row) {
  const CUtensorMap m = *map;
  if (shared_address(shared) % 128) fail("tensor copy: shared address not a multiple of %d", 128);
  const size_t base = shared_address(shared);
  block->bulk_copy(shared, int64_t(m.box[0]) * m.box[1] * 2, barrier, "tensor copy", [=] {
    for (unsigned r = 0; r < m.box[1]; ++r)
      for (unsigned c = 0; c < m.box[0]; ++c) {
        const int64_t i = int64_t(row) + r, j = int64_t(column) + c;
        const bool inside = i >= 0 && j >= 0 && uint64_t(i) < m.extent[1] && uint64_t(j) < m.extent[0];
        uint16_t x = 0;
        if (inside) memcpy(&x, m.base + i * int64_t(m.stride) + j * 2, 2);
        size_t address = base + (size_t(r) * m.box[0] + c) * 2;
        if (m.swizzle == CU_TENSOR_MAP_SWIZZLE_128B) address = emulation::swizzled(address);
        memcpy(emulation::arena() + address, &x, 2);
      }
  });
}

inline void bulk_copy(void *shared, const void *global, int bytes, uint64_t *barrier) {
  if (shared_address(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail("bulk copy: addresses and bytes must be multiples of %d", 16);
  block->bulk_copy(shared, bytes, barrier, "bulk copy", [=] { memcpy(shared, global, size_t(bytes)); });
}

template <int>
void more_registers() {}
template <int>
void fewer_registers() {}

inline void barrier_of(int id, int threads) { block->barrier(id, threads); }

inline void group_fence() {
  block->meet_group("wgmma.fence", nullptr, [](auto &) { emulation::GroupProducts::mine().fenced = true; });
}
inline void group_commit() {
  block->meet_group("wgmma.commit", nullptr, [](auto &) { ++emulation::GroupProducts::mine().group; });
}
template <int kMost>
void group_wait() {
  block->meet_group("wgmma.wait", nullptr, [](auto &) { emulation::GroupProducts::mine().wait(kMost); });
}

template <int kRegisters>
void keep_after(float (&)[kRegisters]) {}

/// The 64 x 16 left operand that four warps hold in registers, each 16 rows as mma.m16n8k16's.
template <typename T>
void read_left_registers(float (&a)[64][16], const std::vector<uint32_t> &registers) {
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      const int lane = row % 8 * 4 + k % 8 / 2, i = row % 16 / 8 + k / 8 * 2;
      a[row][k] = half_of<T>(registers[4 * (row / 16 * 32 + lane) + i], k % 2);
    }
}

template <typename T>
float number_at(size_t address) {
  T x;
  memcpy(&x, emulation::arena() + address, 2);
  return number(x);
}

/// The 128 threads meet; the product is queued. kAcross: a in registers, b across rows.
template <typename T, bool kAcross, int kRegisters>
void queue_product(float (&d)[kRegisters], const uint32_t *registers, uint64_t a, uint64_t b, bool add) {
  constexpr int kColumns = 2 * kRegisters;
  struct Slot {
    float *d;
    const uint32_t *registers;
    uint64_t a, b;
    bool add;
  } slot{d, registers, a, b, add};
  block->meet_group("wgmma", &slot, [](const std::vector<void *> &slots) {
    auto at = [&](int t) { return static_cast<Slot *>(slots[t]); };
    auto &products = emulation::GroupProducts::mine();
    if (!products.fenced) fail("wgmma without wgmma.fence since the last %s", "wait");
    ++statistics.wgmma;
    std::vector<float *> accumulators;
    std::vector<uint32_t> left(4 * 128);
    for (int t = 0; t < 128; ++t) {
      accumulators.push_back(at(t)->d);
      if (at(t)->b != at(0)->b || (!kAcross && at(t)->a != at(0)->a))
        fail("wgmma: descriptors differ among %d threads", 128);
      if (kAcross) std::copy_n(at(t)->registers, 4, &left[4 * t]);
    }
    products.hide(accumulators, kRegisters);
    const uint64_t a_bits = at(0)->a, b_bits = at(0)->b;
    if (a_bits >> 62 != (kAcross ? 0 : 1) || b_bits >> 62 != 1)
      fail("wgmma: only the swizzle of %d bytes is emulated", 128);
    const emulation::Operand a(a_bits), b(b_bits);
    const bool add = at(0)->add;
    auto check_operands = [=](const char *what) {  // rows of 16 bytes
      auto check = [=](size_t address) { block->on_read(emulation::arena() + address, 16, what); };
      for (int row = 0; row < 64 && !kAcross; ++row)
        for (int k = 0; k < 16; k += 8) check(a.along(row, k));
      for (int k = 0; k < 16; k += kAcross ? 1 : 8)
        for (int column = 0; column < kColumns; column += kAcross ? 8 : 1)
          check(kAcross ? b.across(column, k) : b.along(column, k));
    };
    check_operands("wgmma");
    float *key = accumulators[0];
    auto act = [=, &products] {
      check_operands("wgmma, when waited for");
      static float A[64][16], B[16][kColumns], D[64][kColumns];
      if (kAcross) read_left_registers<T>(A, left);
      for (int row = 0; row < 64 && !kAcross; ++row)
        for (int k = 0; k < 16; ++k) A[row][k] = number_at<T>(a.along(row, k));
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < kColumns; ++j) B[k][j] = number_at<T>(kAcross ? b.across(j, k) : b.along(j, k));
      memset(D, 0, sizeof D);
      for (int i = 0; i < 64; ++i)
        for (int k = 0; k < 16; ++k)
          for (int j = 0; j < kColumns; ++j) D[i][j] += A[i][k] * B[k][j];
      auto &values = products.values.at(key);
      for (int t = 0; t < 128; ++t)
        for (int i = 0; i < kRegisters; ++i) {
          const float x = D[t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + 2 * (t % 4) + i % 2];
          values[t][i] = add ? values[t][i] + x : x;
        }
    };
    products.operations.push_back({act, key, products.group});
  });
}

template <typename T, int kRegisters>
void group_multiply_add(float (&d)[kRegisters], uint64_t a, uint64_t b, bool add) {
  queue_product<T, false>(d, nullptr, a, b, add);
}
template <typename T, int kRegisters>
void group_multiply_add_across(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool add) {
  queue_product<T, true>(d, a, 0, b, add);
}

}  // namespace ak::ptx

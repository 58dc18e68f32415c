// What tests set and read: how a launch is scheduled, which GPU it pretends to be, what it did.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace emulation {

constexpr int kWarp = 32;

struct Options {
  uint64_t seed = 0;  // of the schedule; 0: threads in order, copies as late as can be
  bool detect_races = true;
  int capability = 90;  // compute capability, major * 10 + minor
  size_t shared_limit() const {  // bytes a block may ask for
    return size_t(capability == 80 ? 163 : capability < 90 || capability >= 120 ? 99 : 227) << 10;
  }
};
inline Options options;

struct Statistics {
  long blocks, mma, wgmma, ldmatrix, bank_conflicts, copies;
};
inline Statistics statistics;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What went wrong in a launch; kept until cudaGetErrorString tells it.
inline std::string last_error;

template <typename... Parts>
[[noreturn]] void fail(const char *format, Parts... parts) {
  char text[512];
  snprintf(text, sizeof text, format, parts...);
  throw Error(text);
}

/// splitmix64
struct Random {
  uint64_t state;
  uint32_t operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return uint32_t((z ^ (z >> 31)) >> 16);
  }
};

}  // namespace emulation

// The register blocking of AVX-512 (sixteen lanes, blocks of 8 × 48 and 6 × 64) in pairs of AVX2 registers, and
// its products of bfloat16, so that a processor without them can test both. For tests only: slow.
#include "kernel_table.h"
#include "vector_avx2.h"

namespace {

struct EmulatedAvx512 {
  struct Vec {
    __m256 low, high;
  };
  static constexpr int lanes = 16;
  static constexpr int depth = 1;
  static constexpr int score_rows = 8, score_vectors = 3;
  static constexpr int product_rows = 6, product_vectors = 4;

  static Vec zero() { return {Avx2::zero(), Avx2::zero()}; }
  static Vec set(float x) { return {Avx2::set(x), Avx2::set(x)}; }
  static Vec load(const float* p) { return {Avx2::load(p), Avx2::load(p + 8)}; }
  static void store(float* p, Vec x) {
    Avx2::store(p, x.low);
    Avx2::store(p + 8, x.high);
  }
  static Vec broadcast(const float* p) { return set(*p); }
  static Vec add(Vec a, Vec b) { return {Avx2::add(a.low, b.low), Avx2::add(a.high, b.high)}; }
  static Vec subtract(Vec a, Vec b) { return {Avx2::subtract(a.low, b.low), Avx2::subtract(a.high, b.high)}; }
  static Vec multiply(Vec a, Vec b) { return {Avx2::multiply(a.low, b.low), Avx2::multiply(a.high, b.high)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {Avx2::fma(a.low, b.low, c.low), Avx2::fma(a.high, b.high, c.high)}; }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec divide(Vec a, Vec b) { return {Avx2::divide(a.low, b.low), Avx2::divide(a.high, b.high)}; }
  static Vec at_most(Vec bound, Vec x) { return {Avx2::at_most(bound.low, x.low), Avx2::at_most(bound.high, x.high)}; }
  static Vec at_least(Vec bound, Vec x) {
    return {Avx2::at_least(bound.low, x.low), Avx2::at_least(bound.high, x.high)};
  }
  static Vec add_bits(Vec a, Vec b) { return {Avx2::add_bits(a.low, b.low), Avx2::add_bits(a.high, b.high)}; }
  static Vec to_exponent(Vec x) { return {Avx2::to_exponent(x.low), Avx2::to_exponent(x.high)}; }
  static void sums_of_four(const Vec* x, float* sums) {
    __m256 folded[4];
    for (int i = 0; i < 4; ++i) folded[i] = Avx2::add(x[i].low, x[i].high);
    Avx2::sums_of_four(folded, sums);
  }
};

struct EmulatedBf16 : EmulatedAvx512 {
  static constexpr int depth = 2;

  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(low(a), low(b), fma(high(a), high(b), c)); }
  static Vec pair_neighbours(const float* p) {
    float words[lanes];
    for (int lane = 0; lane < lanes; ++lane) words[lane] = word(p[2 * lane], p[2 * lane + 1]);
    return load(words);
  }
  static Vec pair(Vec low, Vec high) {
    float a[lanes], b[lanes];
    store(a, low);
    store(b, high);
    for (int lane = 0; lane < lanes; ++lane) a[lane] = word(a[lane], b[lane]);
    return load(a);
  }

 private:
  static float word(float low, float high) {
    return as_float(to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16);
  }
  static __m256 low(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
  static __m256 high(__m256 x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(-65536))); }
  static Vec low(Vec x) { return {low(x.low), low(x.high)}; }
  static Vec high(Vec x) { return {high(x.low), high(x.high)}; }
};

// Tiles as arrays.
struct EmulatedTiles {
  struct Session {
    Session() {}
  };
  using Register = float[16][16];
  static Register& tile(int number) {
    static thread_local Register registers[8];
    return registers[number];
  }
  template <int number>
  static void clear() {
    std::memset(tile(number), 0, sizeof(Register));
  }
  template <int number>
  static void load(const float* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(tile(number)[row], from + row * stride, 64);
  }
  template <int number>
  static void store(float* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(to + row * stride, tile(number)[row], 64);
  }
  template <int sum, int first, int second>
  static void dot() {
    for (int row = 0; row < 16; ++row) {
      EmulatedBf16::Vec total = EmulatedBf16::load(tile(sum)[row]);
      for (int word = 0; word < 16; ++word) {
        total = EmulatedBf16::multiply_add(EmulatedBf16::broadcast(&tile(first)[row][word]),
                                           EmulatedBf16::load(tile(second)[word]), total);
      }
      EmulatedBf16::store(tile(sum)[row], total);
    }
  }
};

struct EmulatedAmx : EmulatedBf16 {
  using Tiles = EmulatedTiles;
  static constexpr int score_rows = 32, score_vectors = 2;
  static constexpr int product_rows = 32, product_vectors = 2;
};

// Pairs of rows on I, everything else on AVX-512's blocking.
template <class I>
action_kernels::KernelTable in_pairs(const char* name) {
  action_kernels::KernelTable table = kernel_table<EmulatedAvx512>(name);
  table.lse_workspace = lse_workspace<I>;
  table.lse_kept = lse_kept<I>;
  table.lse_forward = lse_forward<I>;
  table.lse_backward = lse_backward<I>;
  table.softplus_workspace = softplus_workspace<I>;
  table.softplus_forward = softplus_forward<I>;
  table.softplus_backward = softplus_backward<I>;
  return table;
}

}  // namespace

namespace action_kernels {

const KernelTable emulated_avx512_kernels = kernel_table<EmulatedAvx512>("emulated-avx512");

const KernelTable emulated_avx512bf16_kernels = in_pairs<EmulatedBf16>("emulated-avx512bf16");
const KernelTable emulated_amx_kernels = in_pairs<EmulatedAmx>("emulated-amx");

}  // namespace action_kernels

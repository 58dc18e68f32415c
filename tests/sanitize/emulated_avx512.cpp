// The register blocking of AVX-512 (sixteen lanes, blocks of 8 × 48 and 6 × 64) in pairs of AVX2 registers,
// so that a processor without AVX-512 can test it. For tests only: slow.
#include "pairwise_lse.h"
#include "prepare_rows.h"
#include "vector_avx2.h"

namespace {

struct EmulatedAvx512 {
  struct Vec {
    __m256 low, high;
  };
  static constexpr int lanes = 16;
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
  static Vec at_least(Vec bound, Vec x) {
    return {Avx2::at_least(bound.low, x.low), Avx2::at_least(bound.high, x.high)};
  }
  static Vec add_bits(Vec a, Vec b) { return {Avx2::add_bits(a.low, b.low), Avx2::add_bits(a.high, b.high)}; }
  static Vec to_exponent(Vec x) { return {Avx2::to_exponent(x.low), Avx2::to_exponent(x.high)}; }
};

}  // namespace

namespace action_kernels {

const KernelTable emulated_avx512_kernels = {
    "emulated-avx512",           lse_workspace<EmulatedAvx512>,   lse_forward<EmulatedAvx512>,
    lse_backward<EmulatedAvx512>, prepare_forward<EmulatedAvx512>, prepare_backward<EmulatedAvx512>,
};

}  // namespace action_kernels

// Eight float32 lanes and the register blocking for AVX2 with FMA: 16 registers, of which each block
// keeps 12 as accumulators.
#pragma once

#include <immintrin.h>

namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int lanes = 8;
  static constexpr int depth = 1;  // elements in a word
  static constexpr int score_rows = 4, score_vectors = 3;
  static constexpr int product_rows = 6, product_vectors = 2;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // a · b + c of words.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  // The smaller of bound and x; x where x is NaN.
  static Vec at_most(Vec bound, Vec x) { return _mm256_min_ps(bound, x); }
  // The larger of bound and x; x where x is NaN.
  static Vec at_least(Vec bound, Vec x) { return _mm256_max_ps(bound, x); }
  // The sum of the lanes' bits as integers.
  static Vec add_bits(Vec a, Vec b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  // The low bits of each lane moved into the exponent's place.
  static Vec to_exponent(Vec x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
  }
  // The sum of the lanes of each of four.
  static void sums_of_four(const Vec* x, float* sums) {
    const Vec all = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace

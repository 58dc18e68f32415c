// Sixteen float32 lanes and the register blocking for AVX-512: 32 registers, of which each block keeps 24
// as accumulators; broadcasts come free as memory operands.
#pragma once

#include <immintrin.h>

namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int lanes = 16;
  static constexpr int depth = 1;  // elements in a word
  static constexpr int score_rows = 8, score_vectors = 3;
  static constexpr int product_rows = 6, product_vectors = 4;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // a · b + c of words.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  // The smaller of bound and x; x where x is NaN.
  static Vec at_most(Vec bound, Vec x) { return _mm512_min_ps(bound, x); }
  // The larger of bound and x; x where x is NaN.
  static Vec at_least(Vec bound, Vec x) { return _mm512_max_ps(bound, x); }
  // The sum of the lanes' bits as integers.
  static Vec add_bits(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  // The low bits of each lane moved into the exponent's place.
  static Vec to_exponent(Vec x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
  }
  // The sum of the lanes of each of four.
  static void sums_of_four(const Vec* x, float* sums) {
    const Vec first = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Vec second = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    const Vec all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

}  // namespace

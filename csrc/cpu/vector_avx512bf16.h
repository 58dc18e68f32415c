// AVX-512 whose products are of pairs of bfloat16 (vdpbf16ps, twice as many a cycle), summed in float32.
#pragma once

#include "vector_avx512.h"

namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int depth = 2;

  // c + a₀b₀ + a₁b₁ for the two halves of each word.
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // 2 × lanes neighbouring floats rounded to as many halves, in order.
  static Vec pair_neighbours(const float* p) {
    return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(load(p + lanes), load(p)));
  }
  // Words whose halves are `low` and `high`, rounded.
  static Vec pair(Vec low, Vec high) {
    const __m512i l = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i h = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    return _mm512_castsi512_ps(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
  }
};

}  // namespace

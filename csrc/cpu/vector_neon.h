// Four float32 lanes and the register blocking for 64-bit Arm: 32 registers, of which each block keeps 24
// as accumulators.
#pragma once

#include <arm_neon.h>

namespace {

struct Neon {
  using Vec = float32x4_t;
  static constexpr int lanes = 4;
  static constexpr int depth = 1;  // elements in a word
  static constexpr int score_rows = 4, score_vectors = 6;
  static constexpr int product_rows = 6, product_vectors = 4;

  static Vec zero() { return vdupq_n_f32(0); }
  static Vec set(float x) { return vdupq_n_f32(x); }
  static Vec load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vec x) { vst1q_f32(p, x); }
  static Vec broadcast(const float* p) { return vld1q_dup_f32(p); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec subtract(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec multiply(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  // a · b + c of words.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec divide(Vec a, Vec b) { return vdivq_f32(a, b); }
  // The smaller of bound and x; x where x is NaN (a comparison with NaN is false).
  static Vec at_most(Vec bound, Vec x) { return vbslq_f32(vcltq_f32(bound, x), bound, x); }
  // The larger of bound and x; x where x is NaN.
  static Vec at_least(Vec bound, Vec x) { return vbslq_f32(vcgtq_f32(bound, x), bound, x); }
  // The sum of the lanes' bits as integers.
  static Vec add_bits(Vec a, Vec b) {
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }
  // The low bits of each lane moved into the exponent's place.
  static Vec to_exponent(Vec x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23)); }
  // The sum of the lanes of each of four.
  static void sums_of_four(const Vec* x, float* sums) {
    store(sums, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
  }
};

}  // namespace

// Four float32 lanes by the compiler's vector extensions, for any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static constexpr int depth = 1;  // elements in a word
  static constexpr int score_rows = 4, score_vectors = 2;
  static constexpr int product_rows = 4, product_vectors = 2;

  static Vec zero() { return Vec{0, 0, 0, 0}; }
  static Vec set(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
  static Vec broadcast(const float* p) { return set(*p); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec subtract(Vec a, Vec b) { return a - b; }
  static Vec multiply(Vec a, Vec b) { return a * b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // a · b + c of words.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec divide(Vec a, Vec b) { return a / b; }
  // The smaller of bound and x; x where x is NaN.
  static Vec at_most(Vec bound, Vec x) { return bound < x ? bound : x; }
  // The larger of bound and x; x where x is NaN.
  static Vec at_least(Vec bound, Vec x) { return bound > x ? bound : x; }
  // The sum of the lanes' bits as integers.
  static Vec add_bits(Vec a, Vec b) { return (Vec)((Bits)a + (Bits)b); }
  // The low bits of each lane moved into the exponent's place.
  static Vec to_exponent(Vec x) { return (Vec)((Bits)x << 23); }
  // The sum of the lanes of each of four.
  static void sums_of_four(const Vec* x, float* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
  }
};

}  // namespace

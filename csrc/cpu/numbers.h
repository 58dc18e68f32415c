// Conversions between float32 and the 16-bit formats, a few elements at a time, for packing and unpacking.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/action_kernels.h"

namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16);
}

// Moves exponent and mantissa into place and repairs the exponent's bias by a product, which also
// normalises subnormal numbers.
inline float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t finite = as_bits(as_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return as_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // ≥ 65520: infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the ulp to 2^-24, so the addition rounds to nearest even.
    const uint32_t aligned = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | aligned);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// float32 values of `count` elements from `start` of a row or map.
inline void load_floats(const void* data, int dtype, int64_t start, int64_t count, float* out) {
  if (dtype == AK_FLOAT32) {
    std::memcpy(out, static_cast<const float*>(data) + start, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + start;
  if (dtype == AK_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = from_float16(from[i]);
  }
}

inline float load_float(const void* data, int dtype, int64_t place) {
  if (dtype == AK_FLOAT32) return static_cast<const float*>(data)[place];
  const uint16_t half = static_cast<const uint16_t*>(data)[place];
  return dtype == AK_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

inline void store_floats(const float* values, int64_t count, void* data, int dtype, int64_t start) {
  if (dtype == AK_FLOAT32) {
    std::memcpy(static_cast<float*>(data) + start, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + start;
  if (dtype == AK_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float16(values[i]);
  }
}

inline int64_t element_size(int dtype) { return dtype == AK_FLOAT32 ? 4 : 2; }

}  // namespace

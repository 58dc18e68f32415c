// Conversions between float32 and the 16-bit formats, a few elements at a time, for packing and unpacking.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../include/action_kernels.h"

// So that a constant count is known where the loops are compiled.
#define AK_ALWAYS_INLINE __attribute__((always_inline)) inline

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

// By its parts, not by a product that would normalise a subnormal float32: those are 0 where the process
// flushes them (torch.set_flush_denormal), the halves are not to be.
inline float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : normal));
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

// Eight at a time where the processor converts them (F16C takes no notice of flushed subnormals either).
AK_ALWAYS_INLINE void from_float16(const uint16_t* from, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_float16(from[i]);
}

AK_ALWAYS_INLINE void to_float16(const float* values, int64_t count, uint16_t* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) to[i] = to_float16(values[i]);
}

// float32 values of `count` elements from `start` of a row or map.
AK_ALWAYS_INLINE void load_floats(const void* data, int dtype, int64_t start, int64_t count, float* out) {
  if (dtype == AK_FLOAT32) {
    std::memcpy(out, static_cast<const float*>(data) + start, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + start;
  if (dtype == AK_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(from[i]);
  } else {
    from_float16(from, count, out);
  }
}

inline float load_float(const void* data, int dtype, int64_t place) {
  if (dtype == AK_FLOAT32) return static_cast<const float*>(data)[place];
  const uint16_t half = static_cast<const uint16_t*>(data)[place];
  return dtype == AK_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

AK_ALWAYS_INLINE void store_floats(const float* values, int64_t count, void* data, int dtype, int64_t start) {
  if (dtype == AK_FLOAT32) {
    std::memcpy(static_cast<float*>(data) + start, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + start;
  if (dtype == AK_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(values[i]);
  } else {
    to_float16(values, count, to);
  }
}

inline int64_t element_size(int dtype) { return dtype == AK_FLOAT32 ? 4 : 2; }

}  // namespace

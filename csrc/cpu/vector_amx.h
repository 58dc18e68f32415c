// AVX-512 whose products of bfloat16 are those of tiles (AMX: 16 × 16 words at once), summed in float32.
//
// By assembly, not intrinsics: a register's number must be a literal there, here it is a template argument.
#pragma once

#include "tile_kernels.h"
#include "vector_avx512bf16.h"

namespace {

struct AmxTiles {
  struct alignas(64) Configuration {
    uint8_t palette = 0;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64, "as the processor reads it");

  // All eight registers hold 16 rows of 64 bytes; then again what they held before.
  class Session {
   public:
    Session() {
      asm volatile("sttilecfg %0" : "=m"(before_));
      Configuration ours;
      ours.palette = 1;
      for (int tile = 0; tile < 8; ++tile) {
        ours.row_bytes[tile] = 64;
        ours.rows[tile] = 16;
      }
      asm volatile("ldtilecfg %0" : : "m"(ours));
    }
    ~Session() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    Configuration before_;
  };

  template <int tile>
  static void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const float* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride * 4), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride * 4), "i"(tile) : "memory");
  }
  template <int sum, int first, int second>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(first), "i"(second));
  }
};

struct Amx : Avx512Bf16 {
  using Tiles = AmxTiles;
  static constexpr int score_rows = 32, score_vectors = 2;
  static constexpr int product_rows = 32, product_vectors = 2;
};

}  // namespace

// Tiles: eight registers of 16 rows of 16 words, and the product that sums bfloat16 pairs of two of them into a third
// (Intel AMX: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).
//
//     C[m][n] += Σ_k A[m][k]₀ · B[k][n]₀ + A[m][k]₁ · B[k][n]₁,   C of floats, A and B of words of two bfloat16
//
// CMFAST_TILES is 1 for the processor's instructions, and 2 for a twin of them in plain C++, which has the same roundings
// and runs anywhere: tests compile the kernels with it where a processor has no tiles.
#pragma once

#include <cstdint>

#include "tensors.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

#if defined(CMFAST_TILES)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif
constexpr int TILE = 16;  // rows of a tile, and words of a row

#if CMFAST_TILES == 1

// The calling thread's tiles, configured as the kernels use them, and released at the end: what else runs in the thread,
// oneDNN say, configures its own.
class TileUse {
 public:
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    } const all;
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  ~TileUse() { asm volatile("tilerelease"); }
  TileUse(const TileUse&) = delete;
};

// The tiles' numbers are parts of the instructions. `stride`: bytes from row to row.
template <int T>
CMFAST_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
CMFAST_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
CMFAST_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
CMFAST_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}


// With every few products: processors switch the upper halves of their vector units off after some 2,000 cycles without
// multiplications there, and the next store of a tile waits 1,000 cycles until they are on again.
CMFAST_INLINE void keep_awake() {
  Floats zero = zeros();
  asm volatile("vfmadd231ps %0, %0, %0" : "+v"(zero));
}

#elif CMFAST_TILES == 2

struct TileUse {
  uint32_t words[8][TILE][TILE];
  static inline thread_local TileUse* now = nullptr;
  TileUse() { now = this; }
  ~TileUse() { now = nullptr; }
};

template <int T>
static void tile_zero() {
  __builtin_memset(TileUse::now->words[T], 0, sizeof TileUse::now->words[T]);
}
template <int T>
static void tile_load(const void* from, int64_t stride) {
  for (int m = 0; m < TILE; ++m) __builtin_memcpy(TileUse::now->words[T][m], (const char*)from + m * stride, 4 * TILE);
}
template <int T>
static void tile_store(void* to, int64_t stride) {
  for (int m = 0; m < TILE; ++m) __builtin_memcpy((char*)to + m * stride, TileUse::now->words[T][m], 4 * TILE);
}

static inline void keep_awake() {}

// A subnormal number counts as 0, as operand and as result.
static inline float tile_float(uint32_t word) {
  if (!(word & 0x7F800000u)) word &= 0x80000000u;
  float x;
  __builtin_memcpy(&x, &word, 4);
  return x;
}
static inline uint32_t tile_word(float x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, 4);
  return word & 0x7F800000u ? word : word & 0x80000000u;
}

// The even elements are summed by fused products, and so are the odd ones; both sums then come to C.
template <int C, int A, int B>
static void tile_multiply() {
  auto& words = TileUse::now->words;
  for (int m = 0; m < TILE; ++m)
    for (int n = 0; n < TILE; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < TILE; ++k) {
        uint32_t a = words[A][m][k], b = words[B][k][n];
        even = tile_float(tile_word(__builtin_fmaf(tile_float(a << 16), tile_float(b << 16), even)));
        odd = tile_float(tile_word(__builtin_fmaf(tile_float(a & 0xFFFF0000u), tile_float(b & 0xFFFF0000u), odd)));
      }
      float sum = tile_float(tile_word(even + odd));
      words[C][m][n] = tile_word(tile_float(words[C][m][n]) + sum);
    }
}

#else

struct TileUse {
  TileUse() {}
};

#endif

}  // namespace CMFAST_ISA
}  // namespace cmfast

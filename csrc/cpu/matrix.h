// The matrix products beneath attention and convolution: eight rows by up to 48 columns at a time, in registers; of
// bfloat16 where a processor has tiles, 32 rows by up to 32 columns.
//
//     C[m][j] = Σ_k A[m][k] · B[k][j]
//
// A lies in blocks of 16 words of a row, [K/16][rows][16]; B is a panel [K][width], width 16, 32 or 48, read once from one
// end to the other. A word is a float, or two bfloat16 of neighbouring k whose products are summed in float32. C has its
// columns in blocks of 16 as well, so that it can be the A of another product.
//
// 24 of AVX-512's 32 registers hold sums; 12 of the others' 16. After so many words they are added to C: of a long sum in
// one register, the later terms would be rounded to the size of all earlier ones; and where a panel is read several times,
// so many of its rows stay in the first cache.
//
// Tiles take whole blocks of 16 words: beyond the last of K both have zeros. Their sums are not cut.
#pragma once

#include "faults.h"
#include "tiles.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

constexpr int BLOCK = 16;

// The sizes of products of floats, and of bfloat16.
template <bool PAIRS>
struct Sizes {
  static constexpr bool TILED = PAIRS && TILES;
  static constexpr int ROWS = TILED ? 2 * TILE : 8, PANEL = TILED ? 2 * TILE : 48;
  static constexpr int64_t LONGEST_SUM = TILED ? int64_t(1) << 40 : REGISTERS == 32 ? 256 : 128;
  static constexpr int WHOLE = TILED ? 2 * BLOCK : BLOCK;  // elements of k that operands are filled up to
};

// Where C lies, in floats: element (m, j) at m·row + (j / 16)·block + j % 16.
struct Product {
  float* c;
  int64_t row, block;
  bool accumulate;
};

// Memory that will be wanted next: so many cache lines for each block of k.
struct Ahead {
  const char* from;
  int64_t lines;
};

CMFAST_INLINE Floats multiply_words(Floats sum, uint32_t a, Words b, bool pairs) {
  if (!pairs) return as_floats(all(a)) * as_floats(b) + sum;
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all(a), (__m512bh)b);
#else
  sum = as_floats(all(a << 16)) * as_floats(b << 16) + sum;
  return as_floats(all(a & 0xFFFF0000u)) * as_floats(b & 0xFFFF0000u) + sum;
#endif
}

template <int M, int V, bool PAIRS>
__attribute__((noinline)) static void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t width, int64_t words,
                                                    const Product& to, int64_t column, Ahead ahead) {
  // Where vector v of the columns begins. Short products are many: no more is computed here than must be.
  float* const first = to.c + (column / BLOCK * to.block + column % BLOCK);
  auto place = [&](int v) __attribute__((always_inline)) {
    if constexpr (LANES == BLOCK) return first + v * to.block;
    int64_t j = column + v * LANES;
    return to.c + j / BLOCK * to.block + j % BLOCK;
  };
  Floats sums[M][V];
  CMFAST_UNROLL
  for (int m = 0; m < M; ++m)
    CMFAST_UNROLL
    for (int v = 0; v < V; ++v) sums[m][v] = zeros();
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    Words right[V];
    CMFAST_UNROLL
    for (int v = 0; v < V; ++v) right[v] = *(const WordsThere*)(b + v * LANES);
    b += width;
    CMFAST_UNROLL
    for (int m = 0; m < M; ++m)
      CMFAST_UNROLL
      for (int v = 0; v < V; ++v) sums[m][v] = multiply_words(sums[m][v], a[m * BLOCK + k], right[v], PAIRS);
  };
  for (; words >= BLOCK; words -= BLOCK, a += Sizes<PAIRS>::ROWS * BLOCK) {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.from + i * 64, 0, 2);
    ahead.from += ahead.lines * 64;
    _Pragma("GCC unroll 4")
    for (int64_t k = 0; k < BLOCK; ++k) step(k);
  }
  if (FAULT(tail_of_products_missed)) words = 0;
  for (int64_t k = 0; k < words; ++k) step(k);
  CMFAST_UNROLL
  for (int m = 0; m < M; ++m)
    CMFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      float* at = place(v) + m * to.row;
      store(at, to.accumulate ? load(at) + sums[m][v] : sums[m][v]);
    }
}

// The products of so many words at a time: body(first word, their number, C as these add to it).
template <bool PAIRS, class Body>
CMFAST_INLINE void for_short_sums(int64_t words, const Product& to, Body body) {
  constexpr int64_t LONGEST = Sizes<PAIRS>::LONGEST_SUM;
  for (int64_t k = 0; k < words; k += LONGEST) {
    int64_t count = words - k < LONGEST ? words - k : LONGEST;
    body(k, count, Product{to.c, to.row, to.block, to.accumulate || k > 0});
  }
}

#if defined(CMFAST_TILES)

template <int T>
struct TileNumber {
  static constexpr int value = T;
};

// body(number, where it lies) of M by V tiles of C, which are tiles 0 to 3.
template <int M, int V, class Body>
CMFAST_INLINE void for_tiles(const Product& to, Body body) {
  float* const lower = to.c + TILE * to.row;
  body(TileNumber<0>(), to.c);
  if (V > 1) body(TileNumber<1>(), to.c + to.block);
  if (M > 1) body(TileNumber<2>(), lower);
  if (M > 1 && V > 1) body(TileNumber<3>(), lower + to.block);
}

template <int M, int V>
CMFAST_INLINE void begin_tiles(const Product& to) {
  const int64_t stride = 4 * to.row;
  for_tiles<M, V>(to, [&](auto tile, float* at) __attribute__((always_inline)) {
    if (to.accumulate) tile_load<tile.value>(at, stride);
    else tile_zero<tile.value>();
  });
}

template <int M, int V>
CMFAST_INLINE void finish_tiles(const Product& to) {
  const int64_t stride = 4 * to.row;
  for_tiles<M, V>(to, [&](auto tile, float* at) __attribute__((always_inline)) { tile_store<tile.value>(at, stride); });
}

// Add 16 words of k: of A, whose tiles lie by themselves, and of B with so many bytes from row to row.
template <int M, int V>
CMFAST_INLINE void add_tiles(const void* upper, const void* lower, const void* b, int64_t stride) {
  tile_load<4>(upper, 64);
  tile_load<6>(b, stride);
  tile_multiply<0, 4, 6>();
  if (V > 1) tile_load<7>((const char*)b + 64, stride);
  if (V > 1) tile_multiply<1, 4, 7>();
  if (M > 1) tile_load<5>(lower, 64);
  if (M > 1) tile_multiply<2, 5, 6>();
  if (M > 1 && V > 1) tile_multiply<3, 5, 7>();
  keep_awake();
}

// The same of operands that are sums of two terms each, the low one so many bytes behind the high one: all products but that
// of both low terms.
template <int M, int V>
CMFAST_INLINE void add_split_tiles(const char* upper, const char* lower, int64_t a_low, const char* b, int64_t stride) {
  add_tiles<M, V>(upper, lower, b, stride);
  tile_load<4>(upper + a_low, 64);
  tile_multiply<0, 4, 6>();
  if (V > 1) tile_multiply<1, 4, 7>();
  if (M > 1) tile_load<5>(lower + a_low, 64);
  if (M > 1) tile_multiply<2, 5, 6>();
  if (M > 1 && V > 1) tile_multiply<3, 5, 7>();
  add_tiles<M, V>(upper, lower, b + TILE * stride, stride);
}

template <int M, int V>
__attribute__((noinline)) static void multiply_by_tiles(const uint32_t* a, const uint32_t* b, int64_t width,
                                                        int64_t words, const Product& to, Ahead ahead) {
  begin_tiles<M, V>(to);
  for (int64_t k = 0; k < words; k += TILE, a += 2 * TILE * TILE, b += TILE * width) {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.from + i * 64, 0, 2);
    ahead.from += ahead.lines * 64;
    add_tiles<M, V>(a, a + TILE * TILE, b, 4 * width);
  }
  finish_tiles<M, V>(to);
}

#endif

// As many rows of A as there are together by one panel of B, or by the first `columns` of it: M rows at a time.
template <bool PAIRS, int M = REGISTERS == 32 ? 8 : 4>
static void multiply_panel(const uint32_t* a, const uint32_t* b, int width, int64_t words, const Product& to,
                           Ahead ahead, int rows = Sizes<PAIRS>::ROWS, int columns = Sizes<PAIRS>::PANEL) {
  if (columns > width) columns = width;
#if defined(CMFAST_TILES)
  if constexpr (PAIRS) {
    if (rows > TILE && columns > TILE) multiply_by_tiles<2, 2>(a, b, width, words, to, ahead);
    else if (rows > TILE) multiply_by_tiles<2, 1>(a, b, width, words, to, ahead);
    else if (columns > TILE) multiply_by_tiles<1, 2>(a, b, width, words, to, ahead);
    else multiply_by_tiles<1, 1>(a, b, width, words, to, ahead);
    return;
  }
#endif
  constexpr int ROWS = Sizes<PAIRS>::ROWS;
  int64_t parts = (columns + 3 * LANES - 1) / (3 * LANES) * ((rows + M - 1) / M);  // that fetch alike
  ahead.lines = (ahead.lines + parts - 1) / parts;
  for_short_sums<PAIRS>(words, to, [&](int64_t k, int64_t count, const Product& sum) {
    for (int j = 0, vectors; j < columns; j += vectors * LANES) {
      vectors = (columns - j) / LANES;
      vectors = vectors == 4 ? 2 : vectors < 3 ? vectors : 3;  // not 3 and 1: of few sums, each waits for itself
      for (int m = 0; m < rows; m += M) {
        Product part{sum.c + m * sum.row, sum.row, sum.block, sum.accumulate};
        const uint32_t *top = a + k * ROWS + m * BLOCK, *left = b + k * width + j;
        if (vectors == 3) multiply_tile<M, 3, PAIRS>(top, left, width, count, part, j, ahead);
        else if (vectors == 2) multiply_tile<M, 2, PAIRS>(top, left, width, count, part, j, ahead);
        else multiply_tile<M, 1, PAIRS>(top, left, width, count, part, j, ahead);
        ahead.from += count / BLOCK * ahead.lines * 64;
      }
    }
  });
}

// The first M rows of A, few enough that a register of sums for each, of all columns, is to be had.
template <int M, bool PAIRS>
static void multiply_columns(const uint32_t* a, const uint32_t* b, int width, int64_t words, const Product& to,
                             Ahead ahead) {
  constexpr int ROWS = Sizes<PAIRS>::ROWS;
  constexpr int MOST = REGISTERS == 32 || M > 2 ? 3 : 6;
  for_short_sums<PAIRS>(words, to, [&](int64_t k, int64_t count, const Product& sum) {
    const uint32_t *top = a + k * ROWS, *columns = b + k * width;
    Ahead meanwhile = ahead;  // the first columns' products fetch for all
    ahead.from += count / BLOCK * ahead.lines * 64;
    for (int j = 0, vectors; j < width; j += vectors * LANES, meanwhile.lines = 0) {
      vectors = (width - j) / LANES;
      vectors = vectors >= MOST ? MOST : vectors >= 2 ? 2 : 1;
      if (vectors == MOST) multiply_tile<M, MOST, PAIRS>(top, columns + j, width, count, sum, j, meanwhile);
      else if (vectors == 2) multiply_tile<M, 2, PAIRS>(top, columns + j, width, count, sum, j, meanwhile);
      else multiply_tile<M, 1, PAIRS>(top, columns + j, width, count, sum, j, meanwhile);
    }
  });
}

// As multiply_panel, of the first `rows` of A alone.
template <bool PAIRS>
static void multiply_rows(int rows, const uint32_t* a, const uint32_t* b, int width, int64_t words, const Product& to,
                          Ahead ahead) {
  if (Sizes<PAIRS>::TILED) return multiply_panel<PAIRS>(a, b, width, words, to, ahead, rows);
  switch (rows) {
    case 1: return multiply_columns<1, PAIRS>(a, b, width, words, to, ahead);
    case 2: return multiply_columns<2, PAIRS>(a, b, width, words, to, ahead);
    case 3: return multiply_columns<3, PAIRS>(a, b, width, words, to, ahead);
    case 4: return multiply_columns<4, PAIRS>(a, b, width, words, to, ahead);
  }
  if constexpr (REGISTERS == 32)
    if (rows <= 6) return multiply_columns<6, PAIRS>(a, b, width, words, to, ahead);
  multiply_panel<PAIRS>(a, b, width, words, to, ahead);
}

// Registers of floats as the words of A: themselves, or bfloat16 to nearest.
CMFAST_INLINE void store_bfloat16(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
  *(HalvesThere*)to = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  *(HalvesThere*)to = __builtin_convertvector(to_bfloat16(x), Halves);
#endif
}

// Adjacent registers, two at a time.
template <int N>
CMFAST_INLINE void store_bfloat16(uint16_t* to, const Floats (&x)[N]) {
  CMFAST_UNROLL
  for (int i = 0; i < N; i += 2) {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]);
    __builtin_memcpy(to + i * LANES, &both, sizeof both);
#else
    store_bfloat16(to + i * LANES, x[i]);
    store_bfloat16(to + (i + 1) * LANES, x[i + 1]);
#endif
  }
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

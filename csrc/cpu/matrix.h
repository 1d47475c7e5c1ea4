// The matrix products beneath attention and convolution: eight rows by up to 48 columns at a time, in registers.
//
//     C[m][j] = Σ_k A[m][k] · B[k][j]
//
// A lies in blocks of 16 words of a row, [K/16][8][16]; B is a panel [K][width], width 16, 32 or 48, read once from one
// end to the other. A word is a float, or two bfloat16 of neighbouring k whose products are summed in float32. C has its
// columns in blocks of 16 as well, so that it can be the A of another product.
//
// 24 of AVX-512's 32 registers hold sums; 12 of the others' 16. After so many words they are added to C: of a long sum in
// one register, the later terms would be rounded to the size of all earlier ones; and where a panel is read several times,
// so many of its rows stay in the first cache.
#pragma once

#include "faults.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

constexpr int ROWS = 8, BLOCK = 16, PANEL = 48, LONGEST_SUM = REGISTERS == 32 ? 256 : 128;

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
  for (; words >= BLOCK; words -= BLOCK, a += ROWS * BLOCK) {
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
template <class Body>
CMFAST_INLINE void for_short_sums(int64_t words, const Product& to, Body body) {
  for (int64_t k = 0; k < words; k += LONGEST_SUM) {
    int64_t count = words - k < LONGEST_SUM ? words - k : LONGEST_SUM;
    body(k, count, Product{to.c, to.row, to.block, to.accumulate || k > 0});
  }
}

// Eight rows of A by one panel of B, or by the first `columns` of it: M rows at a time.
template <bool PAIRS, int M = REGISTERS == 32 ? 8 : 4>
static void multiply_panel(const uint32_t* a, const uint32_t* b, int width, int64_t words, const Product& to,
                           Ahead ahead, int rows = ROWS, int columns = PANEL) {
  if (columns > width) columns = width;
  int64_t parts = (columns + 3 * LANES - 1) / (3 * LANES) * ((rows + M - 1) / M);  // that fetch alike
  ahead.lines = (ahead.lines + parts - 1) / parts;
  for_short_sums(words, to, [&](int64_t k, int64_t count, const Product& sum) {
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
  constexpr int MOST = REGISTERS == 32 || M > 2 ? 3 : 6;
  for_short_sums(words, to, [&](int64_t k, int64_t count, const Product& sum) {
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

// As multiply_panel, of the first `rows` of the eight.
template <bool PAIRS>
static void multiply_rows(int rows, const uint32_t* a, const uint32_t* b, int width, int64_t words, const Product& to,
                          Ahead ahead) {
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

}  // namespace CMFAST_ISA
}  // namespace cmfast

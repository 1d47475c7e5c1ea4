// What attention multiplies: keys, values and queries of each head, packed for the matrix products.
#pragma once

#include "attention.h"
#include "integers.h"
#include "matrix.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// A register of a row of the left operand, a group of rows, from element k on.
template <bool PAIRS>
CMFAST_INLINE void put_row(float* to, int64_t k, int64_t m, Floats x) {
  constexpr int64_t ROWS = Sizes<PAIRS>::ROWS;
  if (PAIRS) store_bfloat16((uint16_t*)to + (k / 32 * ROWS + m) * 32 + k % 32, x);
  else store(to + (k / BLOCK * ROWS + m) * BLOCK + k % BLOCK, x);
}

// Two registers of it, from element k on.
template <bool PAIRS>
CMFAST_INLINE void put_row(float* to, int64_t k, int64_t m, Floats x, Floats next) {
#if defined(__AVX512BF16__)
  if (PAIRS) {
    *(WordsThere*)((uint16_t*)to + (k / 32 * Sizes<PAIRS>::ROWS + m) * 32) = (Words)_mm512_cvtne2ps_pbh((__m512)next, (__m512)x);
    return;
  }
#endif
  put_row<PAIRS>(to, k, m, x);
  put_row<PAIRS>(to, k + LANES, m, next);
}

template <bool PAIRS>
struct Heads : Sizes<PAIRS> {
  using Sizes<PAIRS>::ROWS, Sizes<PAIRS>::PANEL, Sizes<PAIRS>::WHOLE;

  const AttentionArguments& p;
  int64_t size, keys;                    // the head size and the keys, filled up
  uint32_t *packed_k, *packed_v;         // of each head, by default panels of keys [size][48] and of channels [keys][48]
  int64_t words_k, words_v;              // of each head
  static constexpr int64_t WORD = PAIRS ? 2 : 1;  // elements

  Heads(const AttentionArguments& p) : p(p), size(round_up(p.head_size, WHOLE)), keys(round_up(p.keys, WHOLE)) {
    words_k = words_v = size * keys / WORD;
  }

  // The width of a panel where so many columns are left, whole groups: not 48 and then 16, of whose few sums each would
  // wait for itself.
  static CMFAST_INLINE int64_t panel(int64_t left) {
    return LANES == BLOCK && left == 4 * BLOCK ? 2 * BLOCK : at_most(left, PANEL);
  }

  // A register of elements that are `stride` apart, of which `count` are to be had; 0 for the others.
  CMFAST_INLINE Floats some(const void* data, int64_t at, int64_t stride, int64_t count) const {
    return count > 0 ? gather(data, p.dtype, at, stride, (int)at_most(count, LANES)) : zeros();
  }

  static CMFAST_INLINE Words widen(const uint16_t* data) {
    return __builtin_convertvector(*(const HalvesThere*)data, Words);
  }

  // Of the matrix whose element (k, j) is data[at + k·down + j·across]: words k / WORD of a register of columns, of
  // which there are `columns`, as there are `rows`.
  CMFAST_INLINE Words row_of_words(const void* data, int64_t at, int64_t down, int64_t across, int64_t k, int64_t rows,
                                   int64_t columns) const {
    if (PAIRS && p.dtype == BFLOAT16 && across == 1 && columns >= LANES && k + 1 < rows) {
      const uint16_t* first = (const uint16_t*)data + at + k * down;
      return widen(first) | widen(first + down) << 16;
    }
    Floats row = some(data, at + k * down, across, k < rows ? columns : 0);
    if constexpr (!PAIRS) return bits(row);
    Floats next = some(data, at + (k + 1) * down, across, k + 1 < rows ? columns : 0);
    return to_bfloat16(row) | to_bfloat16(next) << 16;
  }

  // The same of a column whose elements adjoin: words k / WORD on, by way of `line`.
  CMFAST_INLINE Words column_of_words(const void* data, int64_t at, int64_t k, int64_t rows, uint16_t* line) const {
    if (PAIRS && p.dtype == BFLOAT16 && rows - k >= 2 * LANES) return *(const WordsThere*)((const uint16_t*)data + at + k);
    Floats first = some(data, at + k, 1, rows - k);
    if constexpr (!PAIRS) return bits(first);
    store_bfloat16(line, first);
    store_bfloat16(line + LANES, some(data, at + k + LANES, 1, rows - k - LANES));
    return *(const WordsThere*)line;
  }

  // Panels of that matrix.
  void pack(uint32_t* to, const void* data, int64_t at, int64_t down, int64_t across, int64_t rows, int64_t columns,
            int64_t padded_rows) const {
    int64_t words = padded_rows / WORD;
    alignas(64) uint16_t line[2 * LANES];
    for (int64_t j = 0, width; j < columns; j += width) {
      width = panel(round_up(columns - j, WHOLE));
      for (int64_t b = 0; b < width; b += LANES, at += LANES * across) {
        int64_t here = columns - j - b;
        if (down == 1 && across != 1) {
          for (int64_t w = 0; w < words; w += LANES) {
            Words square[LANES];
            CMFAST_UNROLL
            for (int64_t i = 0; i < LANES; ++i)
              square[i] = column_of_words(data, at + i * across, w * WORD, i < here ? rows : 0, line);
            transpose(square);
            int64_t there = at_most(words - w, LANES);
            for (int64_t i = 0; i < there; ++i) *(WordsThere*)(to + (w + i) * width + b) = square[i];
          }
        } else {
          for (int64_t w = 0; w < words; ++w)
            *(WordsThere*)(to + w * width + b) = row_of_words(data, at, down, across, w * WORD, rows, here);
        }
      }
      to += words * width;
    }
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

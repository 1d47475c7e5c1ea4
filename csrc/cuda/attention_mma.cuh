// Products of 16-bit tiles for the attention kernels, by the matrix instructions of a warp.
//
// A warp computes 16 rows of a product. A thread's share of them is what mma_m16n8k16 leaves in it: sums[j] are columns
// 8j + 2(lane mod 4) and the next of row lane div 4, and the same two of the row 8 further down.
#pragma once

#include "attention_tiles.cuh"

namespace cmfast {

constexpr int ATTENTION_ROWS = 64;  // of a block's tile: 16 a warp

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int first_row_of_warp() { return static_cast<int>(threadIdx.x) >> 5 << 4; }
// Of a thread's two rows in the block's tile, the first; the other is 8 further down.
__device__ __forceinline__ int row_of_thread() { return first_row_of_warp() + (lane_index() >> 2); }
// Of a thread's columns 8j + ..., the first.
__device__ __forceinline__ int column_of_thread() { return (lane_index() & 3) * 2; }

// A 16x16 operand from a tile in shared memory: elements (line, inner) from there on, both multiples of 16, as they lie
// or transposed, its four 8x8 matrices line by line or column by column.
//
// The address is tile.chunk(line + ..., inner / 8 + ...), written so that what depends on the lane is computed once: a
// multiple of 8 lines does not change the permutation of the chunks, and chunks are permuted by an exclusive or, which
// commutes with that of an even chunk.
template <bool TRANSPOSED, bool LINES_FIRST, class Tile>
__device__ __forceinline__ void load_operand(uint32_t (&words)[4], const Tile& tile, int line, int inner) {
  int lane = lane_index(), next = lane >> 3 & 1, after = lane >> 4;
  int of_lane = Tile::place((lane & 7) + (LINES_FIRST ? next : after) * 8, LINES_FIRST ? after : next);
  const void* row = tile.memory + line * Tile::CHUNKS * 16 + (of_lane ^ inner / 8 * 16);
  if constexpr (TRANSPOSED) ldmatrix_x4_trans(words, shared_address(row));
  else ldmatrix_x4(words, shared_address(row));
}

// The left operand [16 rows, 16 columns] of a product.
template <class T, int ROWS, int COLUMNS, bool ROWS_INNERMOST>
__device__ __forceinline__ void load_left(uint32_t (&words)[4], const Tile<T, ROWS, COLUMNS, ROWS_INNERMOST>& tile,
                                          int row, int column) {
  if constexpr (ROWS_INNERMOST) load_operand<true, false>(words, tile, column, row);
  else load_operand<false, true>(words, tile, row, column);
}

// The right operand [16 k, 16 n] of a product with the tile, [n, k] of it where TRANSPOSED: words 0 and 1 are its first
// eight columns, 2 and 3 the others.
template <bool TRANSPOSED, class T, int ROWS, int COLUMNS, bool ROWS_INNERMOST>
__device__ __forceinline__ void load_right(uint32_t (&words)[4], const Tile<T, ROWS, COLUMNS, ROWS_INNERMOST>& tile,
                                           int k, int n) {
  constexpr bool LINES_ARE_N = TRANSPOSED != ROWS_INNERMOST;
  if constexpr (LINES_ARE_N) load_operand<false, false>(words, tile, n, k);
  else load_operand<true, true>(words, tile, k, n);
}

// The block's own tile [64, COLUMNS], in whichever order its tensor has: that is known only when the kernel runs.
template <class T, int COLUMNS>
struct OwnTile {
  static constexpr int BYTES = ATTENTION_ROWS * COLUMNS * sizeof(T);
  unsigned char* memory;
  bool rows_innermost;

  __device__ __forceinline__ Tile<T, ATTENTION_ROWS, COLUMNS, true> by_column() const { return {memory}; }
  __device__ __forceinline__ Tile<T, ATTENTION_ROWS, COLUMNS, false> by_row() const { return {memory}; }

  __device__ __forceinline__ void load(const Matrix<T>& x, int first) const {
    if (rows_innermost) by_column().load(x, first);
    else by_row().load(x, first);
  }

  __device__ __forceinline__ void store(const Matrix<T>& x, int first) const {
    if (rows_innermost) by_column().store(x, first);
    else by_row().store(x, first);
  }

  // The warp's rows as left operands, 16 columns each.
  __device__ __forceinline__ void read(uint32_t (&words)[COLUMNS / 16][4]) const {
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16) {
      if (rows_innermost) load_left(words[column / 16], by_column(), first_row_of_warp(), column);
      else load_left(words[column / 16], by_row(), first_row_of_warp(), column);
    }
  }

  // Keep them in the memory of the tile, which nobody reads any more, for a loop that has no registers for them. Each
  // thread reads what it has written itself.
  __device__ __forceinline__ void keep(const uint32_t (&words)[COLUMNS / 16][4]) const {
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; ++i)
      kept(16 * i) = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
  }
  __device__ __forceinline__ void load_kept(uint32_t (&words)[4], int column) const {
    uint4 kept_words = kept(column);
    words[0] = kept_words.x;
    words[1] = kept_words.y;
    words[2] = kept_words.z;
    words[3] = kept_words.w;
  }
  __device__ __forceinline__ uint4& kept(int column) const {
    return reinterpret_cast<uint4*>(memory)[column / 16 * ATTENTION_THREADS + threadIdx.x];
  }

  // Put the block's sums into the tile, times a factor for each of the thread's two rows.
  __device__ __forceinline__ void put(const float (&sums)[COLUMNS / 8][4], float factor, float factor_below) const {
    int row = row_of_thread(), column = column_of_thread();
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      uint32_t pairs[2] = {pack<T>(sums[j][0] * factor, sums[j][1] * factor),
                           pack<T>(sums[j][2] * factor_below, sums[j][3] * factor_below)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (rows_innermost) {
          T pair[2];
          memcpy(pair, &pairs[i], 4);
          *by_column().element(row + 8 * i, 8 * j + column) = pair[0];
          *by_column().element(row + 8 * i, 8 * j + column + 1) = pair[1];
        } else {
          *reinterpret_cast<uint32_t*>(by_row().element(row + 8 * i, 8 * j + column)) = pairs[i];
        }
      }
    }
  }
};

// sums [16, N] += left [16, K] · tile [K, N], or its transpose [N, K]; left(words, k) gives 16 columns from k on. UNROLL
// of these steps are written out.
template <class T, int N, int K, bool TRANSPOSED, int UNROLL = K / 16, class Left, class Right>
__device__ __forceinline__ void multiply(float (&sums)[N / 8][4], const Left& left, const Right& tile) {
#pragma unroll UNROLL
  for (int k = 0; k < K; k += 16) {
    uint32_t a[4];
    left(a, k);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t words[4];
      load_right<TRANSPOSED>(words, tile, k, n);
      uint32_t first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
      mma_m16n8k16<T>(sums[n / 8], a, first);
      mma_m16n8k16<T>(sums[n / 8 + 1], a, second);
    }
  }
}

// Sums of one product as the left operand of the next, rounded to T: columns from k on.
template <class T, int N>
__device__ __forceinline__ void narrow_left(uint32_t (&words)[4], const float (&sums)[N][4], int k) {
  const float(&low)[4] = sums[k / 8];
  const float(&high)[4] = sums[k / 8 + 1];
  words[0] = pack<T>(low[0], low[1]);
  words[1] = pack<T>(low[2], low[3]);
  words[2] = pack<T>(high[0], high[1]);
  words[3] = pack<T>(high[2], high[3]);
}

// The sum, or the maximum, over the four threads that share a row.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float maximum_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace cmfast

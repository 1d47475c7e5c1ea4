// Products of float32 tiles for the attention kernels, by multiply-adds: the matrix instructions would round to tf32.
//
// Eight neighbouring threads share ROWS rows of a product (16 such groups make the block's tile) and take four of each
// 32 columns: sums[j][r][i] is row group·ROWS + r and column 32j + column_of_thread(i). Reading four consecutive k, or
// four rows, at a time takes one access of 16 bytes per four values, in both orders of a tile.
#pragma once

#include "attention_tiles.cuh"

namespace cmfast {

constexpr int ATTENTION_GROUPS = ATTENTION_THREADS / 8;

__device__ __forceinline__ int group_of_thread() { return static_cast<int>(threadIdx.x) >> 3; }

// Of the four columns of a thread in 32, number i, where a line of the right operand is a column (and columns that
// neighbours read must be neighbours, to meet all banks) or not (and the four are read together).
template <bool LINES_ARE_COLUMNS>
__device__ __forceinline__ int column_of_thread(int i) {
  int t = static_cast<int>(threadIdx.x) & 7;
  return LINES_ARE_COLUMNS ? t + 8 * i : 4 * t + i;
}

template <int N>
__device__ __forceinline__ void read(float (&values)[N], const float* pointer) {
  Vector<float, N> vector = load_vector<float, N>(pointer);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = vector.data[i];
}

// sums [ROWS, N] += left [rows of the thread, K] · right [K, N], or its transpose [N, K].
template <int ROWS, int K, int N, bool TRANSPOSED, int LEFT_ROWS, int LEFT_COLUMNS, bool LEFT_ROWS_INNERMOST,
          int RIGHT_ROWS, int RIGHT_COLUMNS, bool RIGHT_ROWS_INNERMOST>
__device__ __forceinline__ void multiply_add(
    float (&sums)[N / 32][ROWS][4], const Tile<float, LEFT_ROWS, LEFT_COLUMNS, LEFT_ROWS_INNERMOST>& left,
    const Tile<float, RIGHT_ROWS, RIGHT_COLUMNS, RIGHT_ROWS_INNERMOST>& right) {
  constexpr bool LINES_ARE_COLUMNS = TRANSPOSED != RIGHT_ROWS_INNERMOST;
  int row = group_of_thread() * ROWS;
#pragma unroll 2
  for (int k = 0; k < K; k += 4) {
    float a[4][ROWS];  // [k][row]
    if constexpr (LEFT_ROWS_INNERMOST) {
#pragma unroll
      for (int i = 0; i < 4; ++i) read(a[i], left.element(row, k + i));
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float values[4];
        read(values, left.element(row + r, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i][r] = values[i];
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 32) {
      float b[4][4];  // [k][column]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (LINES_ARE_COLUMNS) {
          float values[4];
          read(values, right.chunk(n + column_of_thread<true>(i), k / 4));
#pragma unroll
          for (int j = 0; j < 4; ++j) b[j][i] = values[j];
        } else {
          read(b[i], right.chunk(k + i, (n + column_of_thread<false>(0)) / 4));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[n / 32][r][j] = fmaf(a[i][r], b[i][j], sums[n / 32][r][j]);
    }
  }
}

// Put a product [ROWS, 32] into a tile that is read again by the threads of the same rows only.
template <bool LINES_ARE_COLUMNS, int ROWS, int TILE_ROWS>
__device__ __forceinline__ void put(const Tile<float, TILE_ROWS, 32, false>& tile, const float (&sums)[ROWS][4]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = group_of_thread() * ROWS + r;
    if constexpr (LINES_ARE_COLUMNS) {
#pragma unroll
      for (int i = 0; i < 4; ++i) *tile.element(row, column_of_thread<true>(i)) = sums[r][i];
    } else {
      store_vector<float, 4>(tile.element(row, column_of_thread<false>(0)),
                             {{sums[r][0], sums[r][1], sums[r][2], sums[r][3]}});
    }
  }
}

// Write a product's sums to the rows of x from `first` on, as far as it has them, each row times its factor: in vectors
// along the rows, in vectors along the columns where the thread's are neighbours, or an element at a time.
template <bool LINES_ARE_COLUMNS, int N, int ROWS>
__device__ __forceinline__ void store(const Matrix<float>& x, int first, const float (&sums)[N][ROWS][4],
                                      const float (&factor)[ROWS]) {
  int row = first + group_of_thread() * ROWS;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    auto value = [&](int r, int i) { return sums[n][r][i] * factor[r]; };
    auto at = [&](int r, int i) {
      return x.data + (row + r) * x.stride_row + (32 * n + column_of_thread<LINES_ARE_COLUMNS>(i)) * x.stride_column;
    };
    auto inside = [&](int r, int i) {
      return row + r < CMFAST_BOUND(1, x.rows) && 32 * n + column_of_thread<LINES_ARE_COLUMNS>(i) < x.columns;
    };
    if (x.vectors && x.rows_innermost) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vector<float, ROWS> vector;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) vector.data[r] = value(r, i);
        if (inside(0, i)) store_global(at(0, i), vector);
      }
    } else if (x.vectors && !LINES_ARE_COLUMNS) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (inside(r, 0))
          store_global(at(r, 0), Vector<float, 4>{{value(r, 0), value(r, 1), value(r, 2), value(r, 3)}});
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (inside(r, i)) *at(r, i) = value(r, i);
    }
  }
}

// The sum, or the maximum, over the eight threads that share rows.
__device__ __forceinline__ float sum_of_group(float x) {
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
__device__ __forceinline__ float maximum_of_group(float x) {
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

}  // namespace cmfast

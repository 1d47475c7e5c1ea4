// What the attention kernels share: where a block works, and tiles of matrices in shared memory.
//
// A matrix [rows, D] of a head lies in memory with one of its indices innermost: D in [N, T, 3·H·D], the rows in
// [N, 3·H·D, T]. A tile keeps that order, so that 16 bytes are copied at a time from both, and what reads the tile has
// two ways to do so. Tensors in neither order, or without 16-byte vectors, are copied an element at a time.
#pragma once

#include "attention.h"
#include "primitives.cuh"

namespace cmfast {

constexpr int ATTENTION_THREADS = 128;
constexpr int ATTENTION_MOST_COLUMNS = 128;

// A tensor [N, H, rows, D] as the kernels take it; no bool, since a launch then passes bytes of no value as well.
struct AttentionView {
  void* data;
  int64_t stride_n, stride_h, stride_row, stride_column;
  int rows_innermost;
  int vectors;  // each 16 bytes along the innermost index are aligned, and inside or outside the matrix as a whole
};

inline AttentionView attention_view(const AttentionTensor& x, const AttentionSizes& sizes, int64_t rows) {
  const int64_t* stride = x.strides;
  int64_t bytes = static_cast<int64_t>(bytes_of(sizes.dtype)), vector = 16 / bytes;
  // The stride of an index that has one value counts for nothing.
  bool rows_innermost = rows > 1 && stride[2] < stride[3];
  int inner = rows_innermost ? 2 : 3;
  const int64_t size[4] = {sizes.samples, sizes.heads, rows, sizes.head_dim};
  bool vectors =
      stride[inner] == 1 && size[inner] % vector == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 4; ++i) vectors = vectors && (i == inner || size[i] == 1 || stride[i] % vector == 0);
  return {x.data, stride[0], stride[1], stride[2], stride[3], rows_innermost, vectors};
}

// The matrix [rows, columns] of one head.
template <class T>
struct Matrix {
  T* data;
  int64_t stride_row, stride_column;
  int rows, columns;
  bool rows_innermost, vectors;
};

template <class T>
__device__ __forceinline__ Matrix<T> matrix_of_head(const AttentionView& x, int n, int h, int rows, int columns) {
  return {static_cast<T*>(x.data) + n * x.stride_n + h * x.stride_h, x.stride_row, x.stride_column, rows, columns,
          x.rows_innermost != 0, x.vectors != 0};
}

// The block's head, as row n·H + h, n and h, and the first row of its tile. The tiles of a head are neighbours, so that
// what they all read stays in the L2 cache; the grid is one axis, since only the first may exceed 65,535 blocks.
struct AttentionBlock {
  int head, n, h, first;
};

template <int ROWS>
__device__ __forceinline__ AttentionBlock attention_block(int heads, int rows) {
  int tiles = (rows + ROWS - 1) / ROWS;
  int head = static_cast<int>(blockIdx.x) / tiles, tile = static_cast<int>(blockIdx.x) % tiles;
  return {head, head / heads, head % heads, tile * ROWS};
}

// ROWS x COLUMNS elements in shared memory, in chunks of 16 bytes that are permuted within 128 bytes: whoever reads the
// same chunk of several lines, or writes it, meets all banks.
template <class T, int ROWS, int COLUMNS, bool ROWS_INNERMOST>
struct Tile {
  static constexpr int VECTOR = 16 / sizeof(T);
  static constexpr int LINES = ROWS_INNERMOST ? COLUMNS : ROWS;
  static constexpr int CHUNKS = (ROWS_INNERMOST ? ROWS : COLUMNS) / VECTOR;  // of a line
  static constexpr int BYTES = ROWS * COLUMNS * sizeof(T);
  static_assert(CHUNKS == 4 || CHUNKS % 8 == 0);

  unsigned char* memory;

  // Where a chunk begins, in bytes.
  __device__ __forceinline__ static int place(int line, int chunk) {
    int turn;
    if constexpr (CHUNKS == 4) turn = (line >> 1) & 3;
    else if constexpr (sizeof(T) == 4) turn = (line ^ (line >> 2)) & 7;  // four lines at distance 4 differ as well
    else turn = line & 7;
    return (line * CHUNKS + (chunk ^ turn)) * 16;
  }

  __device__ __forceinline__ T* chunk(int line, int chunk) const {
    return reinterpret_cast<T*>(memory + place(line, chunk));
  }

  __device__ __forceinline__ T* element(int row, int column) const {
    int line = ROWS_INNERMOST ? column : row, inner = ROWS_INNERMOST ? row : column;
    return chunk(line, inner / VECTOR) + inner % VECTOR;
  }

  // Give the thread's chunks, and where they are in x, whose rows from `first` the tile is for.
  template <class Function>
  __device__ __forceinline__ void for_each_chunk(const Matrix<T>& x, int first, const Function& function) const {
    constexpr int STEP = ATTENTION_THREADS / CHUNKS;  // lines
    static_assert(LINES % STEP == 0);
    int line = static_cast<int>(threadIdx.x) / CHUNKS, inner = static_cast<int>(threadIdx.x) % CHUNKS * VECTOR;
    int64_t stride = ROWS_INNERMOST ? x.stride_column : x.stride_row;
    T* global = x.data + first * x.stride_row + line * stride + inner;
    int rows = CMFAST_BOUND(1, x.rows) - first, lines = ROWS_INNERMOST ? x.columns : rows;
    bool inside = inner < (ROWS_INNERMOST ? rows : x.columns);
#pragma unroll
    for (int i = 0; i < LINES; i += STEP)
      function(chunk(line + i, inner / VECTOR), global + i * stride, inside && line + i < lines);
  }

  // Start to copy the rows from `first`, with zeros outside the matrix. All threads of the block take part.
  __device__ __forceinline__ void load(const Matrix<T>& x, int first) const {
    if (x.vectors && x.rows_innermost == ROWS_INNERMOST) {
      for_each_chunk(x, first, [&](T* shared, T* global, bool inside) { cp_async_16(shared, global, inside); });
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < ROWS * COLUMNS; i += ATTENTION_THREADS) {
        int row = x.rows_innermost ? i % ROWS : i / COLUMNS, column = x.rows_innermost ? i / ROWS : i % COLUMNS;
        bool inside = first + row < CMFAST_BOUND(2, x.rows) && column < x.columns;
        *element(row, column) =
            inside ? x.data[(first + row) * x.stride_row + column * x.stride_column] : from_float<T>(0.0f);
      }
    }
  }

  // Write the rows to x from `first` on, as far as it has them.
  __device__ __forceinline__ void store(const Matrix<T>& x, int first) const {
    if (x.vectors && x.rows_innermost == ROWS_INNERMOST) {
      for_each_chunk(x, first, [&](T* shared, T* global, bool inside) {
        if (inside) store_global(global, load_vector<T, VECTOR>(shared));
      });
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < ROWS * COLUMNS; i += ATTENTION_THREADS) {
        int row = x.rows_innermost ? i % ROWS : i / COLUMNS, column = x.rows_innermost ? i / ROWS : i % COLUMNS;
        if (first + row < CMFAST_BOUND(3, x.rows) && column < x.columns)
          x.data[(first + row) * x.stride_row + column * x.stride_column] = *element(row, column);
      }
    }
  }
};

// What is wrong with the sizes, or nothing.
inline std::string attention_check(const AttentionSizes& sizes) {
  auto text = [](int64_t n) { return std::to_string(n); };
  constexpr int64_t most = 1 << 30;
  if (sizes.dtype != FLOAT32 && sizes.dtype != FLOAT16 && sizes.dtype != BFLOAT16)
    return "attention: expected float32, float16 or bfloat16 (0, 1 or 2), got " + text(sizes.dtype);
  if (sizes.head_dim < 1 || sizes.head_dim > ATTENTION_MOST_COLUMNS)
    return "attention: expected a head size of 1 to " + text(ATTENTION_MOST_COLUMNS) + ", got " + text(sizes.head_dim);
  if (sizes.samples < 0 || sizes.heads < 0 || sizes.queries < 0 || sizes.keys < 1 || sizes.queries > most ||
      sizes.keys > most)
    return "attention: expected N, H >= 0, 0 <= T <= 2^30 and 1 <= S <= 2^30, got N = " + text(sizes.samples) +
           ", H = " + text(sizes.heads) + ", T = " + text(sizes.queries) + ", S = " + text(sizes.keys);
  if (sizes.samples > most || sizes.heads > most || sizes.samples * sizes.heads > most)
    return "attention: expected at most 2^30 heads, got N = " + text(sizes.samples) + ", H = " + text(sizes.heads);
  return "";
}

// One block for each tile of ROWS rows of each head; nothing where there are none.
template <class Parameters>
std::string attention_launch(void (*kernel)(Parameters), const Parameters& parameters, const AttentionSizes& sizes,
                             int64_t rows, int tile_rows, size_t shared_bytes, void* stream) {
  int64_t blocks = sizes.samples * sizes.heads * ((rows + tile_rows - 1) / tile_rows);
  if (blocks == 0) return "";
  if (blocks > 0x7fffffff)
    return "attention: " + std::to_string(blocks) + " tiles of " + std::to_string(tile_rows) +
           " rows are more than a grid has blocks";
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(ATTENTION_THREADS), shared_bytes, stream};
  std::string error = launch(kernel, config, parameters);
  return error.empty() ? error : "attention: " + error;
}

}  // namespace cmfast

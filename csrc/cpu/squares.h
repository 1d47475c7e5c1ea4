// Squares of a matrix of any strides, a register a line: they are read and written along whichever dimension adjoins in
// memory.
#pragma once

#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// The matrix whose element (r, c) is data[at + r·down + c·across].
struct Matrix {
  void* data;
  int dtype;
  int64_t at, down, across;
  // Whether a register of a square is a column, not a row.
  bool by_columns() const { return down == 1 && across != 1; }
};

// The square from element (r, c) on, with so many rows and columns left: its rows, or its columns; 0 beyond the last.
static inline void load_square(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns,
                               Words (&square)[LANES]) {
  bool turned = m.by_columns();
  int64_t lines = turned ? columns : rows, length = turned ? rows : columns;
  int64_t next = turned ? m.across : m.down, along = turned ? 1 : m.across, at = m.at + r * m.down + c * m.across;
  if (m.dtype == FLOAT32 && along == 1 && lines >= LANES && length >= LANES) {
    CMFAST_UNROLL
    for (int i = 0; i < LANES; ++i) square[i] = bits(load((const float*)m.data + at + i * next));
    return;
  }
  int lanes = (int)(length < LANES ? length : LANES);
  for (int i = 0; i < LANES; ++i)
    square[i] = i < lines && lanes > 0 ? bits(gather(m.data, m.dtype, at + i * next, along, lanes)) : Words{};
}

static inline void store_square(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns,
                                const Words (&square)[LANES]) {
  bool turned = m.by_columns();
  int64_t lines = turned ? columns : rows, length = turned ? rows : columns;
  int64_t next = turned ? m.across : m.down, along = turned ? 1 : m.across, at = m.at + r * m.down + c * m.across;
  if (m.dtype == FLOAT32 && along == 1 && lines >= LANES && length >= LANES) {
    CMFAST_UNROLL
    for (int i = 0; i < LANES; ++i) store((float*)m.data + at + i * next, as_floats(square[i]));
    return;
  }
  int lanes = (int)(length < LANES ? length : LANES);
  for (int i = 0; i < LANES && i < lines; ++i)
    scatter(m.data, m.dtype, at + i * next, along, as_floats(square[i]), lanes);
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

// Squares of a matrix of any strides, a register a row: they are read along whichever dimension adjoins in memory.
#pragma once

#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// Of the matrix whose element (r, c) is data[at + r·down + c·across], with so many rows and columns left; 0 beyond them.
static void load_square(const void* data, int dtype, int64_t at, int64_t down, int64_t across, int64_t rows,
                        int64_t columns, Words (&square)[LANES]) {
  bool turned = down == 1 && across != 1;
  int64_t lines = turned ? columns : rows, length = turned ? rows : columns;
  int64_t next = turned ? across : down, along = turned ? 1 : across;
  int lanes = (int)(length < LANES ? length : LANES);
  for (int i = 0; i < LANES; ++i)
    square[i] = i < lines && lanes > 0 ? bits(gather(data, dtype, at + i * next, along, lanes)) : Words{};
  if (turned) transpose(square);
}

// The same, written; the square is not kept.
static void store_square(void* data, int dtype, int64_t at, int64_t down, int64_t across, int64_t rows,
                         int64_t columns, Words (&square)[LANES]) {
  bool turned = down == 1 && across != 1;
  int64_t lines = turned ? columns : rows, length = turned ? rows : columns;
  int64_t next = turned ? across : down, along = turned ? 1 : across;
  int lanes = (int)(length < LANES ? length : LANES);
  if (turned) transpose(square);
  for (int i = 0; i < LANES && i < lines; ++i)
    scatter(data, dtype, at + i * next, along, as_floats(square[i]), lanes);
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

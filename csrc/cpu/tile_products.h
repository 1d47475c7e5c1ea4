// A product of matrices by tiles, done step by step while the rest of the processor has other work.
#pragma once

#include "integers.h"
#include "matrix.h"

namespace cmfast {
namespace CMFAST_ISA {

#if defined(CMFAST_TILES)

// 32 rows of A, as one block of the left operand, by some panels of B.
struct TileProducts {
  const uint32_t *a, *b;
  int64_t words;        // of k, whole tiles
  int64_t columns;      // of B, in panels of 32; of the last 32, the first 16 alone are multiplied where they are all
  int64_t next;         // words from panel to panel
  float* c;
  int64_t row;          // floats from row to row of C
  bool accumulate;
  int64_t column = 0, k = 0;  // what comes next

  bool done() const { return column >= columns; }
  int64_t steps() const { return ceil_divide(columns, 2 * TILE) * (words / TILE); }

  // The next `count` steps, or as many as are left.
  void some(int64_t count) {
    for (; count > 0 && !done(); --count) {
      if (columns - column > TILE) step<2>();
      else step<1>();
    }
  }

 private:
  template <int V>
  CMFAST_INLINE void step() {
    const Product to{c + column, row, TILE, accumulate};
    if (k == 0) begin_tiles<2, V>(to);
    const uint32_t *upper = a + 2 * TILE * k, *right = b + column / (2 * TILE) * next + 2 * TILE * k;
    add_tiles<2, V>(upper, upper + TILE * TILE, right, 8 * TILE);
    k += TILE;
    if (k < words) return;
    finish_tiles<2, V>(to);
    k = 0, column += 2 * TILE;
  }
};

// Two of them, one after the other, spread evenly over so many turns.
class TileProductsMeanwhile {
 public:
  TileProductsMeanwhile(TileProducts& first, TileProducts& second, int64_t turns)
      : first(first), second(second), turns(turns), all(first.steps() + second.steps()) {}

  CMFAST_INLINE void operator()() {
    for (due += all; due >= turns; due -= turns) {
      if (first.done()) second.some(1);
      else first.some(1);
    }
  }
  void rest() {
    first.some(all);
    second.some(all);
  }

 private:
  TileProducts &first, &second;
  int64_t turns, all, due = 0;
};

#endif

}  // namespace CMFAST_ISA
}  // namespace cmfast

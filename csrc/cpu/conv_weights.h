// Weights that are transformed as they are used: so that they are read from memory as 9 words, not as 16 or 36.
#pragma once

#include "matrix.h"
#include "winograd.h"

namespace cmfast {
namespace CMFAST_ISA {

constexpr int64_t MADE_WORDS = 64;  // input channels transformed at a time: their points stay in the cache
// From point to point: not whole pages, whose lines would meet in the same sets.
constexpr int64_t MADE_STRIDE = MADE_WORDS * Sizes<false>::PANEL + 5 * BLOCK;

// `count` input channels of a panel of 3 × 3 kernels, [count][9][width], to Winograd's points, [points][count][width].
template <int M>
CMFAST_INLINE void transform_kernels(const float* kernels, int64_t count, int64_t width, float* to) {
  constexpr int SIDE = M + 2;
  for (int64_t k = 0; k < count; ++k, kernels += 9 * width, to += width)
    for (int64_t j = 0; j < width; j += LANES) {
      Floats half[SIDE * 3];
      CMFAST_UNROLL
      for (int x = 0; x < 3; ++x) {
        Floats column[3];
        CMFAST_UNROLL
        for (int y = 0; y < 3; ++y) {
          const float* at = kernels + (y * 3 + x) * width + j;
          __builtin_prefetch(at + 9 * width);
          column[y] = load(at);
        }
        Winograd<M>::weight(column, 1, half + x, 3);
      }
      CMFAST_UNROLL
      for (int y = 0; y < SIDE; ++y) {
        Floats row[SIDE];
        Winograd<M>::weight(half + 3 * y, 1, row, 1);
        CMFAST_UNROLL
        for (int x = 0; x < SIDE; ++x) store(to + (y * SIDE + x) * MADE_STRIDE + j, row[x]);
      }
    }
}

template <int M>
static void transform_weights(const float* kernels, int64_t count, int64_t width, float* to) {
  constexpr int64_t PANEL = Sizes<false>::PANEL;
  if (width == PANEL) transform_kernels<M>(kernels, count, PANEL, to);  // with constant addresses
  else transform_kernels<M>(kernels, count, width, to);
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

// What a convolution by tiles writes: products with bias, residual and ReLU, and their moments.
#pragma once

#include "faults.h"
#include "running_moments.h"
#include "tile_blocks.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// Elements of an output and of what is added to it, before the channels; out is -1 where a position is none.
struct OutputPlace {
  int64_t out, added;
};

// How outputs are written: whole panels of one dtype, or any.
enum OutputKind { WHOLE_FLOAT32, WHOLE_BFLOAT16, ANY };

// Adds bias and residual to the products of up to two tiles and writes them, so many positions at a time: while the
// next two tiles are multiplied.
template <OutputKind KIND>
struct TileWriter {
  static constexpr int PANEL = TileBlocks::PANEL;

  const TileBlocks& blocks;
  int64_t block, o, width, of_part;
  const float* from;    // products [2 * TILE][PANEL]
  const OutputPlace* places;
  int64_t tile, i, end;  // the first tile; the next position, and their number
  int64_t part, group;   // of the sums
  bool begun;
  Moments sums[PANEL / LANES];

  CMFAST_INLINE void some(int64_t count) {
    for (; count > 0 && i < end; --count, ++i) {
      if (i % TILE == 0) begin_tile();
      if (places[i].out >= 0) position(from + i * PANEL, places[i]);
    }
  }

  void begin_tile() {
    const int64_t at = tile + i / TILE, now = at % of_part / TileBlocks::GROUP;
    if (at / of_part == part && now == group) return;
    finish();
    part = at / of_part, group = now, begun = false;
  }

  void finish() const {
    if (!blocks.partial || part < 0) return;
    const TileBlocks::Part b = blocks.part(block, part);
    float* to = blocks.slot(block, part, group) + o;
    for (int64_t j = 0; j < width; j += LANES)
      sums[j / LANES].finish(to + j, to + blocks.p.shape.out_channels + j, blocks.elements(b, group),
                             (int)at_most(width - j, LANES));
  }

  CMFAST_INLINE void position(const float* products, const OutputPlace& at) {
    const ConvArguments& p = blocks.p;
    const int dtype = KIND == WHOLE_FLOAT32 ? (int)FLOAT32 : KIND == WHOLE_BFLOAT16 ? (int)BFLOAT16 : p.dtype;
    Floats values[PANEL / LANES];
    CMFAST_UNROLL
    for (int v = 0; v < PANEL / LANES; ++v) {
      const int64_t c = o + v * LANES;
      const int lanes = KIND != ANY ? LANES : (int)at_most(width - v * LANES, LANES);
      if (KIND == ANY && lanes <= 0) break;
      Floats value = load(products + v * LANES);
      if (p.bias) value += load(p.bias + c, FLOAT32, 0, lanes);
      if (p.relu && FAULT(relu_before_residual)) value = max(zeros(), value);
      if (p.residual.data) value += residual(at.added + c, dtype, lanes);
      if (p.relu && !FAULT(relu_before_residual)) value = max(zeros(), value);  // NaN stays
      values[v] = value;
      if (KIND != WHOLE_BFLOAT16) store((void*)p.out.data, dtype, at.out + c, value, lanes);
      if (!blocks.partial) continue;
      if (!begun) sums[v].begin(value);
      sums[v].add(value);
    }
    begun = true;
    if (KIND == WHOLE_BFLOAT16) store_bfloat16((uint16_t*)p.out.data + at.out + o, values);
  }

  CMFAST_INLINE Floats residual(int64_t at, int dtype, int lanes) const {
    const ConvTensor& r = blocks.p.residual;
    auto value = [&](int64_t i) __attribute__((always_inline)) { return load(r.data, dtype, i, lanes); };
    if (KIND != ANY || blocks.p.residual_resample != RESAMPLE_POOL || FAULT(residual_not_resampled)) return value(at);
    return 0.25f * ((value(at) + value(at + r.x)) + (value(at + r.y) + value(at + r.y + r.x)));
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

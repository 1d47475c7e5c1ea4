// What a convolution by tiles reads: a block's input, activated, resampled and padded, as planes of bfloat16
// [channels/32][rows][columns][32]. Sixteen neighbouring positions of a row are a tile.
#pragma once

#include "conv_input.h"
#include "faults.h"
#include "team.h"
#include "tile_blocks.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

template <int TERMS>
struct TilePlanes : TileBlocks {
  static constexpr int64_t AHEAD = 16;  // positions that are fetched before they are read

  ConvInput input;

  explicit TilePlanes(const TileBlocks& blocks) : TileBlocks(blocks), input{p} {}

  // Where one image of a block is read, and its plane of the first unit.
  struct Reading {
    Window window;
    int64_t n, z;
    uint16_t* to;
  };

  Reading reading(const Part& b, int64_t i, int64_t d, uint16_t* planes) const {
    const int top = FAULT(paddings_swapped) ? p.left : p.top, left = FAULT(paddings_swapped) ? p.top : p.left;
    return {{b.y * step_y() - top, b.x * step_x() - left, (b.rows - 1) * step_y() + p.shape.height,
             (b.columns - 1) * step_x() + p.shape.width},
            b.n,
            b.z * (FAULT(depth_stride_missed) ? 1 : p.stride_z) - p.front + d + FAULT(depth_tap_one_off),
            planes + i * image * DEEP};
  }

  // Units [begin, end) of a block.
  void put(int64_t block, Share mine, uint16_t* planes) const {
    const int64_t of_image = p.shape.tap_stride() / DEEP;
    for (int64_t unit = mine.begin, here; unit < mine.end; unit += here) {
      const int64_t d = unit / of_image, first = unit % of_image;
      here = at_most(mine.end - unit, of_image - first);
      for (int64_t i = 0; i < parts(block); ++i) {
        Reading r = reading(part(block, i), i, d, planes + unit * TERMS * plane * DEEP);
        if (!common()) put_any(r, first, here);
        else if (p.dtype == FLOAT32) put_common<FLOAT32>(r, first, here);
        else put_common<BFLOAT16>(r, first, here);
      }
    }
  }

  // Whole units of tensors, as most are.
  bool common() const {
    return LANES == BLOCK && p.dtype != FLOAT16 && !p.gate && p.resample != RESAMPLE_POOL && p.stride_y == 1 &&
           p.stride_x == 1 && p.h.channels % DEEP == 0 && p.skip.channels % DEEP == 0 && !FAULT(tail_of_channels_missed) &&
           !FAULT(padding_not_zero) && !FAULT(activation_of_padding) && !FAULT(padding_one_row_off) &&
           !FAULT(depth_edge_not_zero);
  }

  // `count` units from `first` on, position after position: memory is read from one end to the other.
  template <int DTYPE>
  void put_common(const Reading& r, int64_t first, int64_t count) const {
    const Window& w = r.window;
    const int up = p.resample == RESAMPLE_UP;
    const int64_t size = DTYPE == FLOAT32 ? 4 : 2, row = plane_columns * DEEP, next = plane * DEEP;  // from term to term
    const int64_t terms = TERMS * count;
    const int64_t left = at_most(w.x < 0 ? -w.x : 0, w.columns), right = at_most(input.width() - w.x, w.columns);
    const int64_t of_h = p.h.channels / DEEP - first;  // units that are h's, of these
    const int64_t split = of_h < 0 ? 0 : at_most(of_h, count);
    auto clear = [&](int64_t y, int64_t begin, int64_t end) {
      for (int64_t u = 0; u < terms; ++u) __builtin_memset(r.to + u * next + y * row + begin * DEEP, 0, (end - begin) * DEEP * 2);
    };
    for (int64_t y = 0; y < w.rows; ++y) {
      const int64_t from = w.y + y;
      if (r.z < 0 || r.z >= p.depth || from < 0 || from >= input.height() || right <= left) {
        clear(y, 0, w.columns);
        continue;
      }
      if (left > 0) clear(y, 0, left);
      if (right < w.columns) clear(y, right, w.columns);
      if (up && y > 0 && (from & 1)) {  // the row above is the same
        for (int64_t u = 0; u < terms; ++u) {
          uint16_t* to = r.to + u * next + y * row + left * DEEP;
          __builtin_memcpy(to, to - row, (right - left) * DEEP * 2);
        }
        continue;
      }
      const int64_t line = first * DEEP;
      const char* h = (const char*)p.h.data + (p.h.image(r.n, r.z) + (from >> up) * p.h.y + line) * size;
      const char* skip =
          (const char*)p.skip.data + (p.skip.image(r.n, r.z) + (from >> up) * p.skip.y + line - p.h.channels) * size;
      for (int64_t x = left; x < right; ++x) {
        uint16_t* to = r.to + y * row + x * DEEP;
        const int64_t at = w.x + x;
        if (up && x > left && (at & 1)) {  // and so is the position before
          for (int64_t u = 0; u < terms; ++u) __builtin_memcpy(to + u * next, to + u * next - DEEP, DEEP * 2);
          continue;
        }
        put_position<DTYPE>(h, at >> up, p.h.x, r.n, line, 0, split, to, next);
        put_position<DTYPE>(skip, at >> up, p.skip.x, r.n, line, split, count, to, next);
      }
    }
  }

  // A unit of a later position: several are read in turns, which the processor does not foresee.
  template <int DTYPE>
  CMFAST_INLINE static void fetch(const char* later) {
    __builtin_prefetch(later);
    if (DTYPE == FLOAT32) __builtin_prefetch(later + 64);
  }

  // Units [begin, end) of position x of a row of sample n, whose positions are `apart`; of the channels from `line` on.
  template <int DTYPE>
  CMFAST_INLINE void put_position(const char* row, int64_t x, int64_t apart, int64_t n, int64_t line, int64_t begin,
                                  int64_t end, uint16_t* to, int64_t next) const {
    const int64_t size = DTYPE == FLOAT32 ? 4 : 2, rows = n * p.channels() + line;
    const char *from = row + x * apart * size, *later = from + AHEAD * apart * size;
    const float *gain = p.gain ? p.gain + rows : nullptr, *offset = p.gain ? p.offset + rows : nullptr;
    const bool silus = p.silu;
    if (TERMS == 1 && DTYPE == BFLOAT16 && !gain && !silus) {
      for (int64_t u = begin; u < end; ++u) {
        fetch<DTYPE>(later + u * DEEP * size);
        __builtin_memcpy(to + u * next, from + u * DEEP * size, DEEP * size);
      }
      return;
    }
    for (int64_t u = begin; u < end; ++u) {
      fetch<DTYPE>(later + u * DEEP * size);
      Floats values[DEEP / LANES];
      CMFAST_UNROLL
      for (int v = 0; v < DEEP / LANES; ++v) {
        const int64_t c = u * DEEP + v * LANES;
        values[v] = load(from + c * size, DTYPE, 0);
        if (gain) values[v] = values[v] * load(gain + c) + load(offset + c);
        if (silus && TERMS > 1) values[v] = silu(values[v]);
      }
      if (silus && TERMS == 1) silu_to_bfloat16(values);
      CMFAST_UNROLL
      for (int v = 0; v < DEEP / LANES; ++v) put_terms(to + u * TERMS * next + v * LANES, values[v]);
    }
  }

  CMFAST_INLINE void put_terms(uint16_t* to, Floats x) const {
    store_bfloat16(to, x);
    if (TERMS == 2) store_bfloat16(to + plane * DEEP, FAULT(low_terms_missed) ? zeros() : x - high_term(x));
  }

  void put_any(const Reading& r, int64_t first, int64_t count) const {
    const int64_t row = plane_columns * DEEP, along = step_y(), across = step_x();
    for (int64_t c = first * DEEP; c < (first + count) * DEEP; c += BLOCK) {
      uint16_t* to = r.to + (c / DEEP - first) * TERMS * plane * DEEP + c % DEEP;
      input.read(r.window, r.n, r.z, c, [&](int64_t y, int64_t x, int64_t l, Floats value) __attribute__((always_inline)) {
        int64_t of = FAULT(remainders_missed) ? 0 : y % along * across + x % across;
        put_terms(to + of * remainder * DEEP + y / along * row + x / across * DEEP + l, value);
      });
    }
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

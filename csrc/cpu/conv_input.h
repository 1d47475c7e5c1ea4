// Reading a convolution's input: of a tensor or a pair, folded group norm and SiLU applied, resampled, with its padding.
#pragma once

#include "conv.h"
#include "faults.h"
#include "functions.h"
#include "matrix.h"

namespace cmfast {
namespace CMFAST_ISA {

// A block of 16 channels of some rows and columns of the input, as the convolution sees it: [rows][columns][16].
struct Strip {
  float* data;
  int64_t y, x, rows, columns;  // its first row and column, which may lie in the padding
};

struct ConvInput {
  const ConvArguments& p;

  CMFAST_INLINE int64_t channels() const { return p.h.channels + p.skip.channels; }
  int64_t height() const { return resampled(p.height); }
  int64_t width() const { return resampled(p.width); }

  // Channels c to c + LANES of a position, those that there are; 0 for the others.
  CMFAST_INLINE Floats read(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return read_at(n * p.h.n + y * p.h.y + x * p.h.x, n * p.skip.n + y * p.skip.y + x * p.skip.x, c);
  }

  // The same of the position that begins at these elements of the two inputs.
  CMFAST_INLINE Floats read_at(int64_t at_h, int64_t at_skip, int64_t c) const {
    int64_t of_h = p.h.channels - c, left = channels() - c;
    at_h += c, at_skip -= of_h;
    if (of_h >= LANES) return load(p.h.data, p.dtype, at_h);
    if (of_h <= 0) {
      if (left >= LANES) return load(p.skip.data, p.dtype, at_skip);
      return left > 0 ? load(p.skip.data, p.dtype, at_skip, (int)left) : zeros();
    }
    Floats first = load(p.h.data, p.dtype, at_h, (int)of_h);
    if (left == of_h || FAULT(tail_of_channels_missed)) return first;
    float both[2 * LANES];  // where the second input begins within a register
    store(both, first);
    int lanes = (int)(left < LANES ? left : LANES) - (int)of_h;
    store(both + of_h, load(p.skip.data, p.dtype, at_skip + of_h, lanes));
    return load(both);
  }

  // What is done to a register of channels after reading.
  struct Activation {
    Floats gain, offset;
    bool scale, silu;
    CMFAST_INLINE Floats operator()(Floats x) const {
      if (scale) x = x * gain + offset;
      return silu ? CMFAST_ISA::silu(x) : x;
    }
  };

  CMFAST_INLINE Activation activation(int64_t n, int64_t c) const {
    Activation f{all(1.0f), zeros(), p.gain != nullptr, p.silu};
    int64_t lanes = channels() - c < LANES ? channels() - c : LANES, at = n * channels() + c;
    if (p.gain && lanes > 0) {
      f.gain = load(p.gain + at, (int)lanes);
      f.offset = load(p.offset + at, (int)lanes);
    }
    return f;
  }

  // Fill a strip with 16 channels of sample n from channel c on.
  void fill(const Strip& s, int64_t n, int64_t c) const {
    for (int64_t l = 0; l < BLOCK; l += LANES) {
      Activation f = activation(n, c + l);
      if (p.resample == RESAMPLE_NONE)
        fill_lanes(s, l, f, [&](int64_t y, int64_t x) __attribute__((always_inline)) { return f(read(n, y, x, c + l)); });
      else if (p.resample == RESAMPLE_UP)
        fill_lanes(s, l, f,
                   [&](int64_t y, int64_t x) __attribute__((always_inline)) { return f(read(n, y / 2, x / 2, c + l)); });
      else
        fill_lanes(s, l, f, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
          Floats upper = f(read(n, 2 * y, 2 * x, c + l)) + f(read(n, 2 * y, 2 * x + 1, c + l));
          Floats lower = f(read(n, 2 * y + 1, 2 * x, c + l)) + f(read(n, 2 * y + 1, 2 * x + 1, c + l));
          return 0.25f * (upper + lower);
        });
    }
  }

 private:
  int64_t resampled(int64_t size) const {
    return p.resample == RESAMPLE_UP ? 2 * size : p.resample == RESAMPLE_POOL ? size / 2 : size;
  }

  template <class Value>
  CMFAST_INLINE void fill_lanes(const Strip& s, int64_t l, const Activation& f, Value value) const {
    int64_t left = s.x < 0 ? -s.x : 0, right = width() - s.x;
    if (left > s.columns) left = s.columns;
    if (right > s.columns) right = s.columns;
    if (right < left) right = left;
    Floats padding = FAULT(padding_not_zero) ? all(1.0f) : FAULT(activation_of_padding) ? f(zeros()) : zeros();
    for (int64_t r = 0; r < s.rows; ++r) {
      int64_t y = s.y + r + (FAULT(padding_one_row_off) ? 1 : 0);
      float* to = s.data + r * s.columns * BLOCK + l;
      bool inside = y >= 0 && y < height();
      int64_t begin = inside ? left : s.columns, end = inside ? right : s.columns;
      for (int64_t i = 0; i < begin; ++i) store(to + i * BLOCK, padding);
      _Pragma("GCC unroll 2")
      for (int64_t i = begin; i < end; ++i) store(to + i * BLOCK, value(y, s.x + i));
      for (int64_t i = end; i < s.columns; ++i) store(to + i * BLOCK, padding);
    }
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

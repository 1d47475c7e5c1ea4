// Reading a convolution's input: of a tensor or a pair, folded group norm and SiLU applied, resampled, with its padding.
#pragma once

#include "conv.h"
#include "faults.h"
#include "functions.h"
#include "matrix.h"

namespace cmfast {
namespace CMFAST_ISA {

// Some rows and columns of the input, as the convolution sees it.
struct Window {
  int64_t y, x, rows, columns;  // the first row and column may lie in the padding
};

struct ConvInput {
  const ConvArguments& p;

  CMFAST_INLINE int64_t channels() const { return p.channels(); }
  int64_t height() const { return resampled(p.height); }
  int64_t width() const { return resampled(p.width); }

  // LANES channels of a sample: `lanes` of one tensor, then `more` of the other; 0 beyond the last. Or `lanes` of h, by
  // the gate of as many of skip.
  struct Source {
    const void *data, *other;
    int64_t at, y, x, other_at, other_y, other_x;
    int dtype, lanes, more;
    bool second;  // the one tensor is skip
    int gate;

    CMFAST_INLINE Floats operator()(int64_t row, int64_t column) const {
      int64_t i = row * y + column * x;
      // The next channels lie beside these, and will be read when all rows are.
      if (lanes == LANES) __builtin_prefetch((const char*)data + (at + i + BLOCK) * (dtype == FLOAT32 ? 4 : 2), 0, 2);
      return read(i, row * other_y + column * other_x);
    }

    // At so many elements from the sample's first position, of the one tensor and of the other.
    CMFAST_INLINE Floats read(int64_t i, int64_t j) const {
      if (__builtin_expect(gate, GATE_NONE)) return gated(i, j);
      if (lanes == LANES) return load(data, dtype, at + i);
      Floats first = lanes > 0 ? load(data, dtype, at + i, lanes) : zeros();
      if (more <= 0) return first;
      float both[2 * LANES];
      store(both, first);
      store(both + lanes, load(other, dtype, other_at + j, more));
      return load(both);
    }

    __attribute__((noinline)) Floats gated(int64_t i, int64_t j) const {
      if (lanes <= 0) return zeros();
      Floats x = load(data, dtype, at + i, lanes);
      Floats g = load(other, dtype, FAULT(gate_of_first_position) ? other_at : other_at + j, lanes);
      return x * (gate == GATE_GELU ? gelu(g) : gate == GATE_GELU_TANH ? gelu_tanh(g) : silu(g));
    }
  };

  // Of the images that begin at these elements of the tensors.
  CMFAST_INLINE Source source(int64_t h_at, int64_t skip_at, int64_t c) const {
    const ConvTensor &h = p.h, &skip = p.skip;
    int64_t of_h = h.channels - c, left = channels() - c;
    if (left > LANES) left = LANES;
    if (p.gate) {
      int64_t other = skip_at + c;
      return {h.data, skip.data, h_at + c, h.y, h.x, other, skip.y, skip.x, p.dtype, (int)left, 0, false, p.gate};
    }
    if (of_h <= 0) return {skip.data, nullptr, skip_at - of_h, skip.y, skip.x, 0, 0, 0, p.dtype, (int)left, 0, true, 0};
    int lanes = (int)(of_h < LANES ? of_h : LANES), more = FAULT(tail_of_channels_missed) ? 0 : (int)left - lanes;
    return {h.data, skip.data, h_at + c, h.y, h.x, skip_at, skip.y, skip.x, p.dtype, lanes, more, false, 0};
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

  // Give to put(row, column, lane, register), which count from the window's first, 16 channels of image z of sample n from
  // channel c on. z may lie in the padding as well.
  template <class Put>
  void read(Window s, int64_t n, int64_t z, int64_t c, Put put) const {
    if (FAULT(depth_edge_not_zero)) z = z < 0 ? 0 : z < p.depth ? z : p.depth - 1;
    if (z < 0 || z >= p.depth) {
      s.y = height();  // below the last row
      z = 0;
    }
    for (int64_t l = 0; l < BLOCK; l += LANES) {
      Activation f = activation(n, c + l);
      Source at = source(p.h.image(n, z), p.skip.image(n, z), c + l);
      if (p.resample == RESAMPLE_NONE)
        read_lanes(s, l, f, put, [&](int64_t y, int64_t x) __attribute__((always_inline)) { return f(at(y, x)); });
      else if (p.resample == RESAMPLE_UP)
        read_lanes(s, l, f, put, [&](int64_t y, int64_t x) __attribute__((always_inline)) { return f(at(y / 2, x / 2)); });
      else
        read_lanes(s, l, f, put, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
          Floats upper = f(at(2 * y, 2 * x)) + f(at(2 * y, 2 * x + 1));
          Floats lower = f(at(2 * y + 1, 2 * x)) + f(at(2 * y + 1, 2 * x + 1));
          return 0.25f * (upper + lower);
        });
    }
  }

 private:
  int64_t resampled(int64_t size) const {
    return p.resample == RESAMPLE_UP ? 2 * size : p.resample == RESAMPLE_POOL ? size / 2 : size;
  }

  template <class Put, class Value>
  CMFAST_INLINE void read_lanes(const Window& s, int64_t l, const Activation& f, Put put, Value value) const {
    int64_t left = s.x < 0 ? -s.x : 0, right = width() - s.x;
    if (left > s.columns) left = s.columns;
    if (right > s.columns) right = s.columns;
    if (right < left) right = left;
    Floats padding = FAULT(padding_not_zero) ? all(1.0f) : FAULT(activation_of_padding) ? f(zeros()) : zeros();
    for (int64_t r = 0; r < s.rows; ++r) {
      int64_t y = s.y + r + (FAULT(padding_one_row_off) ? 1 : 0);
      bool inside = y >= 0 && y < height();
      int64_t begin = inside ? left : s.columns, end = inside ? right : s.columns;
      for (int64_t i = 0; i < begin; ++i) put(r, i, l, padding);
      _Pragma("GCC unroll 2")
      for (int64_t i = begin; i < end; ++i) put(r, i, l, value(y, s.x + i));
      for (int64_t i = end; i < s.columns; ++i) put(r, i, l, padding);
    }
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

// Convolution with prepared weights: see kernels/conv.py.
#pragma once

#include "tensors.h"

namespace cmfast {

// [N, Y, X, C]: channels are adjacent.
struct ConvTensor {
  const void* data = nullptr;
  int64_t channels = 0;
  int64_t n = 0, y = 0, x = 0;  // strides in elements
};

enum Resample { RESAMPLE_NONE = 0, RESAMPLE_UP = 1, RESAMPLE_POOL = 2 };

// Which convolution: what the packing of weights and their use must agree on.
struct ConvShape {
  int64_t in_channels = 0, out_channels = 0;
  int kernel = 0;           // of kernel by kernel weights
  int tile = 1;             // Winograd's outputs a side, 2 or 4; 1: direct
  bool transformed = true;  // Winograd's weights, by the packing; else as they are used, of float32
  bool pairs = false;       // products of bfloat16

  // The packed weights are [panel][points][words][width]: panels of 48 output channels, of which the last may be 32 or 16
  // wide; a word is a float, or the bfloat16 of two neighbouring k; k counts the input channels, and with a direct
  // kernel of several taps, the taps before them, each with its channels filled up to whole blocks of 16. Weights to be
  // transformed as they are used are [panel][words][9][width].
  CMFAST_INLINE int64_t points() const { return tile == 1 ? 1 : (tile + 2) * (tile + 2); }
  CMFAST_INLINE int64_t tap_stride() const { return (in_channels + 15) / 16 * 16; }
  CMFAST_INLINE int64_t words() const {
    int64_t k = tile > 1 || kernel == 1 ? in_channels : kernel * kernel * tap_stride();
    return pairs ? (k + 1) / 2 : k;
  }
  CMFAST_INLINE int64_t width() const { return (out_channels + 15) / 16 * 16; }
  CMFAST_INLINE bool transforms() const { return tile > 1 && !transformed; }
  CMFAST_INLINE int64_t stored() const { return transforms() ? 9 : points(); }  // words for each k and output
  CMFAST_INLINE int64_t packed_words() const { return stored() * words() * width(); }
};

struct ConvArguments {
  ConvShape shape;
  int64_t samples = 0, height = 0, width = 0;  // of the input, before it is resampled
  int64_t out_height = 0, out_width = 0;
  int stride = 1, padding = 0, resample = RESAMPLE_NONE, residual_resample = RESAMPLE_NONE;
  int dtype = 0;
  ConvTensor h, skip, residual, out;
  const float *gain = nullptr, *offset = nullptr;  // [N, C], of the input
  bool silu = false;
  const uint32_t* weights = nullptr;
  const float* bias = nullptr;  // [Cout]
  float* moments = nullptr;     // [N, 2, Cout]: the output's means and sums of squared deviations
  int threads = 1;
};

struct PackArguments {
  ConvShape shape;
  const float* weight = nullptr;  // [Cout, Cin, kernel, kernel]
  uint32_t* packed = nullptr;
  int threads = 1;
};

}  // namespace cmfast

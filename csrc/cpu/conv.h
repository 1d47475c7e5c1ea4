// Convolution with prepared weights: see kernels/conv.py.
#pragma once

#include "faults.h"
#include "tensors.h"

namespace cmfast {

// [N, Z, Y, X, C]: channels are adjacent. Images are those of one z, of which there is one where there is no depth.
struct ConvTensor {
  const void* data = nullptr;
  int64_t channels = 0;
  int64_t n = 0, z = 0, y = 0, x = 0;  // strides in elements
  CMFAST_INLINE int64_t image(int64_t sample, int64_t depth) const {
    return sample * n + (FAULT(images_of_one_sample) ? 0 : depth * z);
  }
};

// What the second tensor of a pair is to the first: more channels, or what multiplies it once it is activated.
enum Gate { GATE_NONE = 0, GATE_GELU = 1, GATE_GELU_TANH = 2, GATE_SILU = 3 };

enum Resample { RESAMPLE_NONE = 0, RESAMPLE_UP = 1, RESAMPLE_POOL = 2 };

// Which convolution: what the packing of weights and their use must agree on.
struct ConvShape {
  int64_t in_channels = 0, out_channels = 0;
  int depth = 1, height = 0, width = 0;  // of a kernel
  int tile = 1;             // Winograd's outputs a side, 2 or 4; 1: direct
  bool transformed = true;  // Winograd's weights, by the packing; else as they are used, of float32. See split as well
  bool pairs = false;       // products of bfloat16
  bool tiles = false;       // pairs are multiplied by a processor's tiles (tiles.h)

  // The direct form's products of float32 by tiles: both operands are the sums of two bfloat16, high and low.
  CMFAST_INLINE bool split() const { return tiles && tile == 1 && transformed && !pairs; }
  CMFAST_INLINE int64_t terms() const { return split() ? 2 : 1; }

  // The packed weights are [panel][points][words][columns]: panels of 48 output channels, of which the last may be 32 or
  // 16 wide; a word is a float, or the bfloat16 of two neighbouring k; k counts the input channels, and where there are
  // several taps, the taps before them, each with its channels filled up to whole blocks of 16. The taps are those of the
  // depth, with Winograd's points for the others, or all of the direct form. Weights to be transformed as they are used
  // are [panel][words][9][columns].
  //
  // For tiles, panels are 32 wide, and the channels are always filled up to whole blocks of 32, the depth of a tile; and
  // in the direct form k counts 32 channels, the taps of an image before them, then the blocks of channels, then the depth.
  // Where operands are split, the words of 32 channels are followed by their low terms.
  CMFAST_INLINE int64_t points() const { return tile == 1 ? 1 : (tile + 2) * (tile + 2); }
  CMFAST_INLINE int64_t area() const { return height * width; }
  CMFAST_INLINE int64_t taps() const { return depth * (tile == 1 ? area() : 1); }
  CMFAST_INLINE bool tiled() const { return (pairs && tiles) || split(); }
  CMFAST_INLINE int64_t panel() const { return tiled() ? 32 : 48; }
  CMFAST_INLINE int64_t tap_stride() const {
    if (tiled()) return (in_channels + 31) / 32 * 32;
    return taps() == 1 ? in_channels : (in_channels + 15) / 16 * 16;
  }
  CMFAST_INLINE int64_t words() const {
    int64_t k = taps() * tap_stride();
    return tiled() ? k / 2 * terms() : pairs ? (k + 1) / 2 : k;
  }
  CMFAST_INLINE int64_t columns() const { return (out_channels + 15) / 16 * 16; }
  CMFAST_INLINE bool transforms() const { return tile > 1 && !transformed; }
  CMFAST_INLINE int64_t stored() const { return transforms() ? 9 : points(); }  // words for each k and output
  CMFAST_INLINE int64_t packed_words() const { return stored() * words() * columns(); }
};

struct ConvArguments {
  ConvShape shape;
  int64_t samples = 0, depth = 1, height = 0, width = 0;  // of the input, before it is resampled
  int64_t out_depth = 1, out_height = 0, out_width = 0;
  int stride_z = 1, stride_y = 1, stride_x = 1;
  int front = 0, top = 0, left = 0;  // zeros before each dimension; after it as many as the outputs ask for
  int resample = RESAMPLE_NONE, residual_resample = RESAMPLE_NONE;  // of each image: height and width
  int dtype = 0;
  ConvTensor h, skip, residual, out;
  CMFAST_INLINE int64_t channels() const { return h.channels + (gate == GATE_NONE ? skip.channels : 0); }
  const float *gain = nullptr, *offset = nullptr;  // [N, C], of the input
  bool silu = false, relu = false;  // of the input, of the output
  int gate = GATE_NONE;
  const uint32_t* weights = nullptr;
  const float* bias = nullptr;  // [Cout]
  float* moments = nullptr;     // [N, 2, Cout]: the output's means and sums of squared deviations
  int threads = 1;
};

struct PackArguments {
  ConvShape shape;
  const float* weight = nullptr;  // [Cout, Cin, depth, height, width]
  uint32_t* packed = nullptr;
  int threads = 1;
};

}  // namespace cmfast

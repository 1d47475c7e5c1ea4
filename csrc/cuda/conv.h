// Convolutions of 3 x 3 elements, of stride 1 and padding 1, in 16-bit dtypes. kernels/conv.py says what they compute,
// kernels/reference/conv.py defines it, kernels/cuda/conv_plan.py chooses the tile and the parts of the sum.
#pragma once

#include <cstdint>
#include <string>

namespace cmfast {

constexpr int CONV_ROWS = 8;       // of positions of a tile
constexpr int CONV_COLUMNS = 32;   // channels of the output of a tile
constexpr int CONV_CHANNELS = 32;  // channels of the input of a step

// An image [N, C, H, W] with its channels innermost, 16-byte vectors of them aligned; strides in elements. No data: none.
struct ConvImage {
  void* data;
  int64_t stride_n, stride_y, stride_x;
};

// A row of C float32 values for each sample, its vectors of four aligned; no data: none.
struct ConvRows {
  const float* data;
  int64_t stride_n;
};

enum ConvResample : int { CONV_SAME = 0, CONV_NEAREST = 1, CONV_AVERAGE = 2 };

struct ConvProblem {
  ConvImage h, skip, residual, out;
  ConvRows gain, offset;
  const void* weight;  // [9 (C1 + C2), Cout] in dtype
  const float* bias;   // [Cout], or nullptr
  float* moments;      // [N, 2, Cout], or nullptr
  float* workspace;    // of more than one segment their sums [segments, N, H, W, Cout]; else the tiles' moments, if asked
                       // for, [N, tiles, 2, Cout]
  int64_t samples, height, width;  // of the output
  int64_t channels, skip_channels, columns;
  int dtype;  // of the images and weights: a DType
  int up;     // whether h and skip are upsampled by 2, nearest
  int silu, relu;
  int residual_resample;  // a ConvResample
  int tile_width;         // positions of a tile's row: 16 or 8
  int segment;            // steps of a part of the sum; those of h come before those of skip
};

// Write out and moments. Empty, or what is wrong.
std::string conv2d(const ConvProblem& problem, void* stream);

}  // namespace cmfast

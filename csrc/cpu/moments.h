// Moments of channels, and group norm folded from them: see kernels/moments.py.
#pragma once

#include "group_norm.h"
#include "tensors.h"

namespace cmfast {

struct MomentsArguments {
  int64_t samples = 0, positions = 0;
  int dtype = 0;
  NormTensor x;              // channels are adjacent
  float* moments = nullptr;  // [N, 2, C]
  int threads = 1;
};

struct FoldArguments {
  int64_t samples = 0, positions = 0, groups = 0;
  ChannelMoments h, skip;
  NormRow weight, bias, add, scale, shift;
  float eps = 0;
  float *gain = nullptr, *offset = nullptr;  // [N, C], of the channels of both
};

}  // namespace cmfast

// Layer norm and RMS norm of the channels at each position: see kernels/channel_norm.py.
#pragma once

#include "group_norm.h"
#include "tensors.h"

namespace cmfast {

struct ChannelNormArguments {
  int64_t samples = 0, positions = 0;
  int dtype = 0;
  NormTensor x, y;  // channels are adjacent, or positions
  NormRow weight, bias, scale, shift;
  float eps = 0, least = 0;
  bool centred = true, silu = false;
  int threads = 1;
};

}  // namespace cmfast

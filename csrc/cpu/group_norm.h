// Group norm: see kernels/group_norm.py.
#pragma once

#include "tensors.h"

namespace cmfast {

// [N, C, P]: a tensor whose spatial dimensions have been merged into one.
struct NormTensor {
  const void* data = nullptr;
  int64_t channels = 0;
  int64_t n = 0, c = 0, p = 0;  // strides in elements
};

// [N, C] or, with a stride of 0, [C]; channels are adjacent.
struct NormRow {
  const float* data = nullptr;
  int64_t stride = 0;
};

// [N, 2, C]: the means, and the sums of squared deviations from them, of the channels of a tensor.
struct ChannelMoments {
  const float* data = nullptr;
  int64_t channels = 0;
};

struct NormArguments {
  int64_t samples = 0, positions = 0, groups = 0;
  int dtype = 0;
  NormTensor h, skip, y;  // y has the channels of both
  NormRow weight, bias, add, scale, shift;
  ChannelMoments moments, skip_moments;  // of h and of skip, where they are known
  float eps = 0;
  bool silu = false;
  float *mean = nullptr, *rstd = nullptr;  // [N, groups]; null where nobody reads them
  int threads = 1;
};

struct NormBackwardArguments {
  int64_t samples = 0, positions = 0, groups = 0;
  int dtype = 0;
  NormTensor grad, h, skip, dx;  // grad and dx have the channels of both
  NormRow weight, bias, add, scale, shift;
  bool silu = false;
  const float *mean = nullptr, *rstd = nullptr;  // [N, groups]
  float *dz_sum = nullptr, *dzu_sum = nullptr;   // [N, C]
  int threads = 1;
};

}  // namespace cmfast

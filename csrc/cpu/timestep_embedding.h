// The sinusoids of timesteps: see kernels/timestep_embedding.py.
#pragma once

#include "tensors.h"

namespace cmfast {

struct TimestepArguments {
  int64_t samples = 0, count = 0;      // timesteps, and frequencies
  const float* t = nullptr;            // [N]
  int64_t stride = 0;                  // of t, in elements
  const float* frequencies = nullptr;  // [F], adjacent
  float scale = 1;
  bool sin_first = false;
  float* y = nullptr;  // [N, 2·F], adjacent
  int threads = 1;
};

}  // namespace cmfast

// The consistency step: see kernels/consistency.py.
#pragma once

#include "tensors.h"

namespace cmfast {

// A tensor of the shape of x; without data, one that was not given or not asked for.
struct StepTensor {
  void* data = nullptr;
  int dtype = 0;
  int64_t strides[MAX_DIMS] = {};  // in elements
};

// A coefficient: sample n's element of a vector, or a scalar where there is none.
struct Coefficient {
  const float* vector = nullptr;
  int64_t stride = 0;
  float scalar = 0;
};

// sample and model_input have the strides of denoised; they are made where their data is given.
struct StepArguments {
  int dims = 0;
  int64_t shape[MAX_DIMS] = {};  // [N, C, *spatial]
  StepTensor x, model_output, noise, denoised, sample, model_input;
  Coefficient a, b, alpha, beta, input_scale;
  bool clip = false;
  float low = 0, high = 0;
  bool seeded = false;
  uint64_t seed = 0;
  uint32_t draw = 0, first_sample = 0;
  int threads = 1;
};

// The gradients dx, doutput and dnoise have the same strides; dnoise is made where its data is given. A gradient of an
// output that is not given is zero.
struct StepBackwardArguments {
  int dims = 0;
  int64_t shape[MAX_DIMS] = {};  // [N, C, *spatial]
  StepTensor ddenoised, dsample, dinput, x, model_output, dx, doutput, dnoise;
  Coefficient a, b, alpha, beta, input_scale;
  bool clip = false;
  float low = 0, high = 0;
  int threads = 1;
};

}  // namespace cmfast

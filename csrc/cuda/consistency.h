// The launchers of the consistency step: see kernels/consistency.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cmfast {

// A tensor of the shape of x; without data, one that was not given or not asked for.
struct StepTensor {
  void* data = nullptr;
  int dtype = 0;
  std::vector<int64_t> strides;  // in elements
};

// A coefficient: sample n's element of a vector, or a scalar where there is none.
struct Coefficient {
  const float* vector = nullptr;
  int64_t stride = 0;
  float scalar = 0;
};

struct Coefficients {
  Coefficient a, b, alpha, beta, input_scale;
  bool clip = false;
  float low = 0, high = 0;
};

// The seed and the first sample are those of the launch or, where an address is given, what lies there when it runs.
struct Noise {
  bool seeded = false;
  uint64_t seed = 0;
  uint32_t draw = 0, first_sample = 0;
  const int64_t *seed_at = nullptr, *first_sample_at = nullptr;  // on the device
};

// denoised, sample and model_input have the strides of `out`; sample and model_input are made where their data is given.
struct StepArguments {
  std::vector<int64_t> shape;  // [N, C, *spatial]
  StepTensor x, model_output, noise, out;
  void *sample = nullptr, *model_input = nullptr;
  Coefficients coefficients;
  Noise seed;
};
std::string consistency_step(const StepArguments& arguments, void* stream);

// dx, d_output and d_noise have the strides of `out`, whose dtype is dx's; d_output has model_output's.
struct StepBackwardArguments {
  std::vector<int64_t> shape;
  StepTensor d_denoised, d_sample, d_input, x, model_output, out;
  void *d_output = nullptr, *d_noise = nullptr;
  int d_noise_dtype = 0;
  Coefficients coefficients;
};
std::string consistency_step_backward(const StepBackwardArguments& arguments, void* stream);

}  // namespace cmfast

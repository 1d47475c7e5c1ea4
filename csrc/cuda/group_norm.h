// Group normalisation with what surrounds it in a diffusion U-Net, and its gradient; kernels/group_norm.py states the
// formula. The host's side: what a call is, and how it is divided among the blocks of a launch.
//
// A launcher checks what it is given, launches on the stream and returns what went wrong, or an empty string. It
// allocates nothing and waits for nothing.

#pragma once

#include <cstdint>
#include <string>

namespace cmfast {

/// A tensor [N, C, P]: its memory, and its strides in elements.
struct Strided {
  void* data = nullptr;
  int64_t n = 0, c = 0, p = 0;
};

/// A parameter [N, C], or [C] with the stride n = 0; its channels are adjacent. No memory: the parameter is not there.
struct Rows {
  const void* data = nullptr;
  int64_t n = 0;
  int dtype = 0;
};

/// x (a tensor h, or a pair that stands for the concatenation of h and skip) and its parameters.
struct GroupNormProblem {
  Strided h, skip;
  Rows weight, bias, add, scale, shift;
  int64_t samples = 0, positions = 0, channels = 0;
  int64_t first_channels = 0;  // of h
  int64_t num_groups = 0;
  int dtype = 0;
  float eps = 0;
  bool silu = false;
};

/// Where `group_norm` puts its results: y in the dtype of x, mean and rstd [N, num_groups] in float32.
struct GroupNormOutput {
  Strided y;
  float* mean = nullptr;
  float* rstd = nullptr;
};

/// What `group_norm_backward` takes besides the problem, and where it puts its results: dx, dz_sum and dzu_sum [N, C].
struct GroupNormGradient {
  Strided dy, dx;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  float* dz_sum = nullptr;
  float* dzu_sum = nullptr;
};

/// Memory that lives as long as the launches do. `floats` is at least what the functions below ask for.
struct Workspace {
  float* data = nullptr;
  int64_t floats = 0;
};

/// The floats of workspace that a call needs. capability: of the device, 80 for 8.0.
int64_t group_norm_workspace(const GroupNormProblem& problem, const GroupNormOutput& output, int capability);
int64_t group_norm_backward_workspace(const GroupNormProblem& problem, const GroupNormGradient& gradient);

std::string group_norm(const GroupNormProblem& problem, const GroupNormOutput& output, Workspace workspace,
                     int capability, void* stream);
std::string group_norm_backward(const GroupNormProblem& problem, const GroupNormGradient& gradient,
                              Workspace workspace, void* stream);

}  // namespace cmfast

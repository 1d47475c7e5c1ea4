// The sinusoids of timesteps of torch's tensors as they are: see kernels/direct.
#pragma once

#include "../cpu/timestep_embedding.h"
#include "tensors.h"

namespace cmfast {

// The arguments of the kernel, of tensors alone; none where they are not as it takes them. y [N, 2·F] is an empty tensor.
inline std::optional<TimestepArguments> timestep_arguments(py::handle y, py::handle t, py::handle frequencies) {
  std::optional<dlpack::Tensor> of[] = {described(y), described(t), described(frequencies)};
  for (const auto& each : of)
    if (!each || dtype_code(*each) != FLOAT32) return {};
  if (of[0]->ndim != 2 || of[1]->ndim != 1 || of[2]->ndim != 1 || !contiguous(*of[0]) || !contiguous(*of[2])) return {};
  TimestepArguments p;
  p.samples = of[1]->shape[0];
  p.count = of[2]->shape[0];
  if (of[0]->shape[0] != p.samples || of[0]->shape[1] != 2 * p.count) return {};
  p.t = (const float*)of[1]->data;
  p.stride = of[1]->strides[0];
  p.frequencies = (const float*)of[2]->data;
  p.y = (float*)of[0]->data;
  return p;
}

}  // namespace cmfast

// Layer norm and RMS norm of torch's tensors as they are: see kernels/direct.
#pragma once

#include "../cpu/channel_norm.h"
#include "tensors.h"

namespace cmfast {

// The arguments of the kernel, of tensors alone; none where they are not as it takes them. y is an empty tensor; rows are
// weight, bias, scale and shift.
inline std::optional<ChannelNormArguments> channel_norm_arguments(py::handle y, py::handle x,
                                                                  const py::handle (&rows)[4]) {
  ChannelNormArguments p;
  PlanesReader images;
  if (!images.read(x, &p.x) || !images.read(y, &p.y)) return {};
  if (!images.channels_adjoin() && !images.positions_adjoin()) return {};
  p.samples = images.samples();
  p.positions = images.positions();
  p.dtype = images.dtype();
  int64_t channels = p.x.channels;
  if (p.y.channels != channels || p.samples * channels * p.positions == 0) return {};
  NormRow* each[] = {&p.weight, &p.bias, &p.scale, &p.shift};
  for (int i = 0; i < 4; ++i)
    if (!read_row(rows[i], i < 2 ? 0 : p.samples, channels, each[i], kept_row(i))) return {};
  return p;
}

}  // namespace cmfast

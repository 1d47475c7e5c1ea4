// Group norm of torch's tensors as they are: see kernels/direct.
#pragma once

#include "tensors.h"

namespace cmfast {

// The arguments of the kernel, of images and rows alone; none where the tensors are not as it takes them. y is an empty
// tensor.
inline std::optional<NormArguments> norm_arguments(py::handle y, py::handle h, py::handle skip, int64_t groups,
                                                   const py::handle (&rows)[5]) {
  NormArguments p;
  PlanesReader images;
  if (!images.read(h, &p.h) || !images.read(y, &p.y) || (!skip.is_none() && !images.read(skip, &p.skip))) return {};
  int64_t channels = p.h.channels + p.skip.channels;
  p.samples = images.samples();
  p.positions = images.positions();
  p.groups = groups;
  p.dtype = images.dtype();
  if (p.y.channels != channels || groups < 1 || channels % groups) return {};
  if (!(images.channels_adjoin() || images.positions_adjoin()) || p.samples * channels * p.positions == 0) return {};
  if (!read_rows(rows, p.samples, channels, &p)) return {};
  return p;
}

}  // namespace cmfast

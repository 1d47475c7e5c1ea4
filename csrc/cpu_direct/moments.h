// Moments of channels, and group norm folded from them or applied by them, of torch's tensors as they are: see
// kernels/direct.
#pragma once

#include "../cpu/moments.h"
#include "group_norm.h"
#include "tensors.h"

namespace cmfast {

// The float32 moments [N, 2, C] of a tensor; none where they are not, or do not follow one another in memory.
inline std::optional<dlpack::Tensor> described_moments(py::handle tensor) {
  std::optional<dlpack::Tensor> t = described(tensor);
  if (!t || t->ndim != 3 || t->shape[1] != 2 || dtype_code(*t) != FLOAT32 || !contiguous(*t)) return {};
  return t;
}

// Of a tensor of so many samples and channels. None is none where there are no channels.
inline bool read_moments(py::handle tensor, int64_t samples, int64_t channels, ChannelMoments* into) {
  if (tensor.is_none()) return channels == 0;
  std::optional<dlpack::Tensor> t = described_moments(tensor);
  if (!t || t->shape[0] != samples || t->shape[2] != channels) return false;
  *into = {(const float*)t->data, channels};
  return true;
}

// The arguments of the kernel: the channels of x are adjacent, and moments is an empty tensor.
inline std::optional<MomentsArguments> moments_arguments(py::handle moments, py::handle x) {
  MomentsArguments p;
  PlanesReader images;
  if (!images.read(x, &p.x) || !images.channels_adjoin()) return {};
  p.samples = images.samples();
  p.positions = images.positions();
  p.dtype = images.dtype();
  ChannelMoments written;
  if (!read_moments(moments, p.samples, p.x.channels, &written)) return {};
  p.moments = (float*)written.data;
  return p;
}

// The arguments of the kernel, gain and offset empty tensors; none where the others are not as it takes them.
inline std::optional<FoldArguments> fold_arguments(py::handle gain, py::handle offset, py::handle first,
                                                   py::handle second, int64_t size, int64_t groups,
                                                   const py::handle (&rows)[5]) {
  FoldArguments p;
  std::optional<dlpack::Tensor> m = described_moments(first);
  std::optional<dlpack::Tensor> after = second.is_none() ? std::nullopt : described_moments(second);
  if (!m || (!second.is_none() && (!after || after->shape[0] != m->shape[0]))) return {};
  p.samples = m->shape[0];
  p.h = {(const float*)m->data, m->shape[2]};
  if (after) p.skip = {(const float*)after->data, after->shape[2]};
  p.positions = size;
  p.groups = groups;
  int64_t channels = p.h.channels + p.skip.channels;
  if (size < 1 || groups < 1 || channels % groups || rows[0].is_none() || rows[1].is_none()) return {};
  if (!read_rows(rows, p.samples, channels, &p)) return {};
  std::optional<dlpack::Tensor> written[] = {described(gain), described(offset)};
  if (!written[0] || !written[1]) return {};
  p.gain = (float*)written[0]->data;
  p.offset = (float*)written[1]->data;
  return p;
}

// The arguments of group norm's kernel with the moments of its input.
inline std::optional<NormArguments> apply_arguments(py::handle y, py::handle h, py::handle skip, py::handle first,
                                                    py::handle second, int64_t groups, const py::handle (&rows)[5]) {
  if (rows[0].is_none() || rows[1].is_none() || first.is_none()) return {};
  std::optional<NormArguments> p = norm_arguments(y, h, skip, groups, rows);
  if (!p || !read_moments(first, p->samples, p->h.channels, &p->moments) ||
      !read_moments(second, p->samples, p->skip.channels, &p->skip_moments))
    return {};
  return p;
}

}  // namespace cmfast

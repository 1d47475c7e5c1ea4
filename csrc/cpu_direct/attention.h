// Attention of torch's tensors as they are: see kernels/direct.
#pragma once

#include "../cpu/attention.h"
#include "tensors.h"

namespace cmfast {

// The arguments of the kernel, without where it writes the log-sum-exp; none where the tensors are not as it takes them.
inline std::optional<AttentionArguments> attention_arguments(py::handle out, py::handle q, py::handle k, py::handle v) {
  const py::handle given[] = {out, q, k, v};
  AttentionArguments p;
  AttentionTensor* into[] = {&p.out, &p.q, &p.k, &p.v};
  std::optional<dlpack::Tensor> t[4];
  for (int i = 0; i < 4; ++i) {
    t[i] = described(given[i]);
    if (!t[i] || t[i]->ndim != 4 || dtype_code(*t[i]) < 0 || dtype_code(*t[i]) != dtype_code(*t[0])) return {};
    const int64_t* strides = t[i]->strides;
    *into[i] = {t[i]->data, strides[0], strides[1], strides[2], strides[3]};
  }
  const int64_t *queries = t[1]->shape, *keys = t[2]->shape;
  if (!same_shape(*t[0], *t[1]) || !same_shape(*t[2], *t[3])) return {};
  if (queries[0] != keys[0] || queries[1] != keys[1] || queries[3] != keys[3]) return {};
  p.samples = queries[0], p.heads = queries[1], p.queries = queries[2], p.keys = keys[2], p.head_size = queries[3];
  if (p.samples * p.heads * p.queries * p.keys * p.head_size == 0) return {};
  p.dtype = dtype_code(*t[0]);
  return p;
}

}  // namespace cmfast

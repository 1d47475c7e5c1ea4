// Softmax attention and its derivative. kernels/attention.py says what they compute, kernels/reference/attention.py
// defines it.
#pragma once

#include <cstdint>
#include <string>

namespace cmfast {

// A tensor [N, H, rows, D]: T rows for q and what has its shape, S rows for k and v. Strides in elements, any of them.
struct AttentionTensor {
  void* data;
  int64_t strides[4];
};

struct AttentionSizes {
  int dtype;  // of the tensors: a DType
  int64_t samples, heads, queries, keys, head_dim;
  float scale;
};

// Write out, and lse, dense [N, H, T]. Empty, or what is wrong.
std::string attention_forward(const AttentionSizes& sizes, const AttentionTensor& q, const AttentionTensor& k,
                              const AttentionTensor& v, const AttentionTensor& out, float* lse, void* stream);

// Write dq, dk and dv from what the forward wrote, for at least one query; delta is a workspace as large as lse. Empty,
// or what is wrong.
std::string attention_backward(const AttentionSizes& sizes, const AttentionTensor& grad, const AttentionTensor& q,
                               const AttentionTensor& k, const AttentionTensor& v, const AttentionTensor& out,
                               const float* lse, float* delta, const AttentionTensor& dq, const AttentionTensor& dk,
                               const AttentionTensor& dv, void* stream);

}  // namespace cmfast

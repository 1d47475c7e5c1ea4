// Attention: see kernels/attention.py.
#pragma once

#include "tensors.h"

namespace cmfast {

struct AttentionTensor {
  const void* data = nullptr;
  int64_t n = 0, h = 0, t = 0, d = 0;  // strides in elements
};

struct AttentionArguments {
  int64_t samples = 0, heads = 0, queries = 0, keys = 0, head_size = 0;
  int dtype = 0;
  bool pairs = false;  // products of bfloat16, which those of bfloat16 tensors always are
  AttentionTensor q, k, v, out;
  float* lse = nullptr;  // [N, H, T]
  float scale = 0;
  int threads = 1;
};

struct AttentionBackwardArguments {
  int64_t samples = 0, heads = 0, queries = 0, keys = 0, head_size = 0;
  int dtype = 0;
  AttentionTensor grad, q, k, v, out, dq, dk, dv;
  const float* lse = nullptr;  // [N, H, T]
  float scale = 0;
  int threads = 1;
};

}  // namespace cmfast

// What attention_backward.cu and attention_backward_float.cu share.
#pragma once

#include "attention_tiles.cuh"

namespace cmfast {

struct AttentionBackward {
  AttentionView grad, q, k, v, out, dq, dk, dv;
  const float* lse;
  float* delta;
  float scale;
  int heads, queries, keys, head_dim;
};

// exp(scale · score − lse). The exponent is scaled by log2 e only after the subtraction: lse is rounded at its own
// size, and to round it once more, scaled, would double the error.
__device__ __forceinline__ float attention_weight(float score, float scale, float lse) {
  return fast_exp2(fmaf(score, scale, -lse) * 1.4426950408889634f);
}

std::string attention_backward_float(const AttentionBackward& p, const AttentionSizes& sizes, void* stream);

}  // namespace cmfast

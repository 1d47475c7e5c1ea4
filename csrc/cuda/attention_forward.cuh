// What attention_forward.cu and attention_forward_float.cu share.
#pragma once

#include "attention_tiles.cuh"

namespace cmfast {

struct AttentionForward {
  AttentionView q, k, v, out;
  float* lse;
  float scale;
  int heads, queries, keys, head_dim;
};

std::string attention_forward_float(const AttentionForward& p, const AttentionSizes& sizes, void* stream);

}  // namespace cmfast

// What follows the products of a convolution: conv_sum.cu.
#pragma once

#include "conv.h"

namespace cmfast {

// Add up the segments in the workspace, and write out and moments. Empty, or what is wrong.
std::string conv_sum(const ConvProblem& p, int64_t segments, void* stream);

// Merge the moments of the tiles in the workspace. Empty, or what is wrong.
std::string conv_merge(const ConvProblem& p, int64_t tiles_y, int64_t tiles_x, void* stream);

}  // namespace cmfast

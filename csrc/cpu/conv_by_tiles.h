// The direct form of conv2d in bfloat16, by a processor's tiles.
#pragma once

#include "conv.h"

namespace cmfast {
namespace CMFAST_ISA {

const char* conv_by_tiles(const ConvArguments&);

}  // namespace CMFAST_ISA
}  // namespace cmfast

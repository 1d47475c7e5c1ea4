// The convolution of conv2d whose kernel is one element, of stride 1 and without padding or resampling.
#pragma once

#include "conv.h"

namespace cmfast {
namespace CMFAST_ISA {

const char* pointwise(const ConvArguments&);

}  // namespace CMFAST_ISA
}  // namespace cmfast

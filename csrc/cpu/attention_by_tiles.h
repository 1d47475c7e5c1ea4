// Attention in bfloat16, by a processor's tiles.
#pragma once

#include "attention.h"

namespace cmfast {
namespace CMFAST_ISA {

const char* attention_by_tiles(const AttentionArguments&);

}  // namespace CMFAST_ISA
}  // namespace cmfast

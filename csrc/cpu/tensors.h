// What the kernels' arguments have in common.
#pragma once

#include <cstdint>

#define CMFAST_INLINE inline __attribute__((always_inline))

namespace cmfast {

constexpr int MAX_DIMS = 16;

// The codes of kernels/native.py.
enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

}  // namespace cmfast

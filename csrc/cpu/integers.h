// Limits and divisions of sizes.
#pragma once

#include <cstdint>

namespace cmfast {

// Internal to each file: compiled for its own instruction set.
static inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
static inline int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }
static inline int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }
static inline int64_t round_up(int64_t x, int64_t unit) { return ceil_divide(x, unit) * unit; }

}  // namespace cmfast

// The rows of a group norm in float64, half a register of a group's channels at a time.
#pragma once

#include "group_norm.h"
#include "integers.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// Of channel c of sample n on; `otherwise` where there is no row. Lanes beyond those asked for may be anything.
static CMFAST_INLINE Doubles row(const NormRow& r, int64_t n, int64_t c, int lanes, double otherwise) {
  return r.data ? load_wide(r.data + n * r.stride + c, lanes) : otherwise - Doubles{};
}

// f(channel, lanes) of the half registers of so many channels.
template <class F>
static CMFAST_INLINE void each_half(int64_t begin, int64_t end, F f) {
  for (int64_t c = begin; c < end; c += HALF_LANES) f(c, (int)at_most(end - c, HALF_LANES));
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

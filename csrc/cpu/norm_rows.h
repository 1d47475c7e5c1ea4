// What a group norm and its gradient share: their rows in float64, half a register of a group's channels at a time, and
// how a pass over their input is divided.
#pragma once

#include "group_norm.h"
#include "faults.h"
#include "integers.h"
#include "team.h"
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

static inline bool adjacent_channels(const NormTensor& t) { return !t.data || t.c == 1 || t.channels == 1; }
static inline bool adjacent_positions(const NormTensor& t, int64_t positions) {
  return !t.data || t.p == 1 || positions == 1;
}

// Piece i of a pass over a sample of h and skip, with the channel at which each begins: a chunk of positions of both
// where channels are adjacent, and else a channel of one of them.
template <class Arguments, class Rows, class Plane>
static CMFAST_INLINE void piece(const Arguments& p, bool channels_last, int64_t i, Rows rows, Plane plane) {
  int64_t base = FAULT(second_input_from_zero) ? 0 : p.h.channels;
  if (channels_last) {
    rows(p.h, 0, i);
    if (p.skip.data) rows(p.skip, base, i);
  } else if (i < p.h.channels) {
    plane(p.h, 0, i);
  } else {
    plane(p.skip, base, i - p.h.channels);
  }
}

// Whether threads may have whole units each, such as samples: without one that waits for long.
static inline bool divides(int64_t units, int threads) { return units % threads == 0 || units >= 4 * threads; }

// f(sample, piece) of a thread's share of all pieces, so many a sample.
template <class F>
static CMFAST_INLINE void each_of(Share part, int64_t pieces, F f) {
  for (int64_t i = part.begin; i < part.end; ++i) f(i / pieces, i % pieces);
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

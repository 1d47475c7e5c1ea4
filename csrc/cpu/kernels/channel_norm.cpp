// Layer norm and RMS norm: a position's channels stay in the first cache while their mean and their mean square are
// taken, one after the other, and the result is written.
//
// Weight, bias and FiLM are folded to one multiply-add a channel: once, or with FiLM at the beginning of each sample.
#include "../channel_norm.h"

#include "../faults.h"
#include "../functions.h"
#include "../isa.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t SMALL = 1 << 14;  // elements that one thread takes sooner than two

struct ChannelNorm {
  const ChannelNormArguments& p;
  int64_t channels;

  // Gain and offset [C] of sample n.
  void fold(int64_t n, float* gain, float* offset) const {
    auto at = [&](const NormRow& r, int64_t c) { return r.data[n * r.stride + c]; };
    for (int64_t c = 0; c < channels; ++c) {
      float film = p.scale.data ? 1.0f + at(p.scale, c) : 1.0f;
      gain[c] = (p.weight.data ? at(p.weight, c) : 1.0f) * film;
      offset[c] = (p.bias.data ? at(p.bias, c) * film : 0.0f) + (p.shift.data ? at(p.shift, c) : 0.0f);
    }
  }

  // The sum of f(register, its channels from c on) over a position's channels; lanes beyond the last are 0.
  template <class Term>
  CMFAST_INLINE float total(int64_t at, Term term) const {
    Floats sums[2] = {zeros(), zeros()};
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
      for (int i = 0; i < 2; ++i) sums[i] += term(load(p.x.data, p.dtype, at + c + i * LANES));
    for (int64_t end = FAULT(tail_of_channels_missed) ? c : channels; c < end; c += LANES) {
      int lanes = (int)(channels - c < LANES ? channels - c : LANES);
      Floats value = term(load(p.x.data, p.dtype, at + c, lanes));
      sums[0] += (Ints)iota() < lanes ? value : zeros();
    }
    return sum(sums[0] + sums[1]);
  }

  CMFAST_INLINE void normalise(int64_t from, int64_t to, const float* gain, const float* offset) const {
    float count = (float)channels;
    float mean = p.centred && !FAULT(mean_not_subtracted)
                     ? total(from, [](Floats x) __attribute__((always_inline)) { return x; }) / count : 0.0f;
    float square = total(from, [&](Floats x) __attribute__((always_inline)) { return (x - mean) * (x - mean); }) / count;
    float rstd = 1.0f / __builtin_sqrtf((square < p.least ? p.least : square) + p.eps);
    auto normal = [=](Floats x, Floats by, Floats plus) __attribute__((always_inline)) {
      return (x - mean) * rstd * by + plus;
    };
    if (p.silu) write(from, to, gain, offset, [=](Floats x, Floats by, Floats plus) __attribute__((always_inline)) {
      return CMFAST_ISA::silu(normal(x, by, plus));
    });
    else write(from, to, gain, offset, normal);
  }

  // A position's f(register, its gain, its offset).
  template <class F>
  CMFAST_INLINE void write(int64_t from, int64_t to, const float* gain, const float* offset, F f) const {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      Floats x = load(p.x.data, p.dtype, from + c);
      store((void*)p.y.data, p.dtype, to + c, f(x, load(gain + c), load(offset + c)), LANES);
    }
    if (int lanes = (int)(channels - c)) {
      Floats x = load(p.x.data, p.dtype, from + c, lanes);
      store((void*)p.y.data, p.dtype, to + c, f(x, load(gain + c, lanes), load(offset + c, lanes)), lanes);
    }
  }
};

}  // namespace

const char* channel_norm(const ChannelNormArguments& p) {
  ChannelNorm norm{p, p.x.channels};
  if (p.samples <= 0 || norm.channels <= 0 || p.positions <= 0) return "the input has no elements";
  float* rows = (float*)scratch(SCRATCH_ROWS, p.threads * 2 * norm.channels * 4);
  if (!rows) return "no memory for the rows";
  bool film = p.scale.data || p.shift.data;  // rows of a sample: tokens may each be a sample
  auto body = [&](Team team) {
    float *gain = rows + team.rank * 2 * norm.channels, *offset = gain + norm.channels;
    Share mine = share(p.samples * p.positions, team);
    int64_t last = -1;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t n = i / p.positions, at = i % p.positions;
      if (last < 0 || (film && n != last && !FAULT(rows_of_first_sample))) norm.fold(n, gain, offset);
      last = n;
      norm.normalise(n * p.x.n + at * p.x.p, n * p.y.n + at * p.y.p, gain, offset);
    }
  };
  parallel(p.samples * p.positions * norm.channels < SMALL ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

// Layer norm and RMS norm: a position's channels stay in the first cache while their mean and their mean square are
// taken, one after the other, and the result is written.
//
// In NHWC a register holds neighbouring channels of a position, in NCHW neighbouring positions of a channel: a few
// registers of positions are taken at once, and their channels are kept one after the other, since planes of a power of
// two would fall on one another in the cache.
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
constexpr int WIDE = 4;             // registers of positions, where there are enough for all threads

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

  // ---- planes: the same of WIDTH registers of positions, from `at` of a sample on, whose channels are kept in `kept`

  template <int WIDTH, class F>
  CMFAST_INLINE void each(float* kept, F f) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < WIDTH; ++i) f(c, i, kept + (c * WIDTH + i) * LANES);
  }

  template <int WIDTH>
  void normalise_planes(int64_t n, int64_t at, const float* gain, const float* offset, float* kept) const {
    int lanes[WIDTH];  // beyond the last position there are none
    for (int i = 0; i < WIDTH; ++i) {
      int64_t left = p.positions - at - i * LANES;
      lanes[i] = (int)(left < 0 || (left < LANES && FAULT(tail_of_positions_missed)) ? 0 : left < LANES ? left : LANES);
    }
    const int64_t from = n * p.x.n + at, to = n * p.y.n + at;
    const float count = (float)channels;
    Floats mean[WIDTH] = {}, square[WIDTH] = {}, rstd[WIDTH];
    each<WIDTH>(kept, [&](int64_t c, int i, float* k) __attribute__((always_inline)) {
      Floats x = lanes[i] ? load(p.x.data, p.dtype, from + c * p.x.c + i * LANES, lanes[i]) : zeros();
      store(k, x);
      mean[i] += x;
    });
    for (int i = 0; i < WIDTH; ++i) mean[i] = p.centred && !FAULT(mean_not_subtracted) ? mean[i] / count : zeros();
    each<WIDTH>(kept, [&](int64_t, int i, float* k) __attribute__((always_inline)) {
      Floats x = load(k) - mean[i];
      square[i] += x * x;
    });
    for (int i = 0; i < WIDTH; ++i) {
      Floats whole = square[i] / count;
      rstd[i] = 1.0f / sqrt((whole < p.least ? all(p.least) : whole) + p.eps);
    }
    auto normal = [&](int64_t c, int i, float* k) __attribute__((always_inline)) {
      return (load(k) - mean[i]) * rstd[i] * gain[c] + offset[c];
    };
    auto written = [&](int64_t c, int i, Floats y) __attribute__((always_inline)) {
      if (lanes[i]) store((void*)p.y.data, p.dtype, to + c * p.y.c + i * LANES, y, lanes[i]);
    };
    if (p.silu) each<WIDTH>(kept, [&](int64_t c, int i, float* k) __attribute__((always_inline)) {
      written(c, i, CMFAST_ISA::silu(normal(c, i, k)));
    });
    else each<WIDTH>(kept, [&](int64_t c, int i, float* k) __attribute__((always_inline)) {
      written(c, i, normal(c, i, k));
    });
  }
};

}  // namespace

const char* channel_norm(const ChannelNormArguments& p) {
  ChannelNorm norm{p, p.x.channels};
  if (p.samples <= 0 || norm.channels <= 0 || p.positions <= 0) return "the input has no elements";
  const bool rows = p.x.c == 1 && p.y.c == 1;
  if (!rows && (p.x.p != 1 || p.y.p != 1))
    return "the channels, or the positions, of both tensors must be adjacent in memory";
  const bool wide = p.samples * p.positions >= p.threads * WIDE * LANES;
  const int64_t together = rows ? 1 : (wide ? WIDE : 1) * LANES;  // positions
  const int64_t pieces = (p.positions + together - 1) / together;
  const int64_t needed = norm.channels * (rows ? 2 : 2 + together);
  float* memory = (float*)scratch(SCRATCH_ROWS, p.threads * needed * 4);
  if (!memory) return "no memory for the rows";
  bool film = p.scale.data || p.shift.data;  // rows of a sample: tokens may each be a sample
  auto body = [&](Team team) {
    float *gain = memory + team.rank * needed, *offset = gain + norm.channels, *kept = offset + norm.channels;
    Share mine = share(p.samples * pieces, team);
    int64_t last = -1;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t n = i / pieces, at = i % pieces * together;
      if (last < 0 || (film && n != last && !FAULT(rows_of_first_sample))) norm.fold(n, gain, offset);
      last = n;
      if (rows) norm.normalise(n * p.x.n + at * p.x.p, n * p.y.n + at * p.y.p, gain, offset);
      else if (wide) norm.normalise_planes<WIDE>(n, at, gain, offset, kept);
      else norm.normalise_planes<1>(n, at, gain, offset, kept);
    }
  };
  parallel(p.samples * p.positions * norm.channels < SMALL ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

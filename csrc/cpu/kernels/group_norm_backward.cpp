// The gradient of group norm, in two passes over its input and the gradient of its output: Σ dz and Σ dz·û of each
// channel, then
//
//     dx = rstd · (gain · dz − mean(gain · dz) − û · mean(gain · dz · û))       the means over each group
//
// where gain = weight · (1 + scale), û is the normalised input, and dz the gradient before the activation. In a pass, û
// and dz are a multiply-add a channel away from what is read: the rows of a sample hold its factors.
//
// A thread takes whole samples where there are enough, or in NCHW whole groups: then the second pass finds in its cache
// what the first one read, and takes dz from where dx will be. Otherwise the threads share the pieces of each pass:
// chunks of positions in NHWC, channels in NCHW. A chunk's sums are short, and are added in float64 in one order
// whatever the number of threads.
#include "../faults.h"
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../norm_rows.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t CHUNK_OF_ROWS = 32, CHUNK_OF_PLANE = 16 * LANES;  // positions: a lane adds 32 of them, or 16
constexpr int64_t KEPT = 1 << 15;   // elements of a sample or group whose dz stays in the second cache
constexpr int64_t SMALL = 1 << 12;  // elements that one thread takes sooner than two

// What the passes need of a sample, [C] each:
//
//     û = (x − centre) · rstd    z = (x − centre) · factor + offset    dx = dz · factor + (x − centre) · slope + constant
struct Sample {
  int64_t n;
  float *centre, *factor, *offset, *slope, *constant;
  float* parts;  // [chunks][2][C]: Σ dz and Σ dz·(x − centre) of each chunk
};

struct Gradient {
  const NormBackwardArguments& p;
  int64_t channels, chunk, chunks;
  bool channels_last, kept;  // kept: after the first pass, dz lies where dx will be
  float* memory;

  int64_t floats() const { return (5 + 2 * chunks) * channels; }

  Sample sample(int64_t n, int64_t slot) const {
    float* m = memory + slot * floats();
    return {n, m, m + channels, m + 2 * channels, m + 3 * channels, m + 4 * channels, m + 5 * channels};
  }

  // ---- rows

  // f(channel, lanes) of the half registers of a group's channels.
  template <class F>
  CMFAST_INLINE void of_group(int64_t g, F f) const {
    each_half(g * (channels / p.groups), (g + 1) * (channels / p.groups), f);
  }

  // x + add − mean is x − middle, and centre is middle + rounding.
  Doubles middle(int64_t n, int64_t g, int64_t c, int lanes) const {
    return (double)p.mean[n * p.groups + g] - row(p.add, n, c, lanes, 0);
  }
  Doubles rounding(int64_t n, int64_t g, int64_t c, int lanes) const {
    if (!p.add.data) return Doubles{};
    const Doubles exact = middle(n, g, c, lanes);
    return wide(narrow(exact)) - exact;
  }

  void fold(const Sample& s, int64_t g) const {
    const double rstd = p.rstd[s.n * p.groups + g];
    of_group(g, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const Doubles film = 1.0 + row(p.scale, s.n, c, lanes, 0), factor = rstd * row(p.weight, 0, c, lanes, 1) * film;
      const Doubles moved = row(p.bias, 0, c, lanes, 0) * film + row(p.shift, s.n, c, lanes, 0);
      store_narrow(s.centre + c, middle(s.n, g, c, lanes), lanes);
      store_narrow(s.factor + c, factor, lanes);
      store_narrow(s.offset + c, moved + rounding(s.n, g, c, lanes) * factor, lanes);
    });
  }

  // The sums of a group's channels, and what they make of its rows.
  void merge(const Sample& s, int64_t g) const {
    const double rstd = p.rstd[s.n * p.groups + g];
    const int64_t last = FAULT(last_sums_missed) && chunks > 1 ? chunks - 1 : chunks;
    Doubles factor_dz{}, factor_dzu{};  // factor = rstd · gain, and 0 beyond the group's channels
    of_group(g, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      Doubles dz{}, dzx{};
      for (const float *part = s.parts + c, *stop = part + last * 2 * channels; part < stop; part += 2 * channels) {
        dz += load_wide(part, lanes);
        dzx += load_wide(part + channels, lanes);
      }
      const Doubles dzu = (dzx + rounding(s.n, g, c, lanes) * dz) * rstd, factor = load_wide(s.factor + c, lanes);
      store_narrow(p.dz_sum + s.n * channels + c, dz, lanes);
      store_narrow(p.dzu_sum + s.n * channels + c, dzu, lanes);
      factor_dz += factor * dz;
      factor_dzu += factor * dzu;
    });
    const double inverse = 1.0 / ((double)(channels / p.groups) * (double)p.positions);
    const double constant = FAULT(gradient_of_mean_missed) ? 0 : -sum(factor_dz) * inverse;
    const double slope = FAULT(gradient_of_variance_missed) ? 0 : -rstd * sum(factor_dzu) * inverse;
    of_group(g, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      store_narrow(s.slope + c, slope - Doubles{}, lanes);
      store_narrow(s.constant + c, constant + rounding(s.n, g, c, lanes) * slope, lanes);
    });
  }

  // ---- the first pass

  CMFAST_INLINE void prefetch(const void* data, int64_t i) const {
    __builtin_prefetch((const char*)data + i * (p.dtype == FLOAT32 ? 4 : 2), 0, 2);
  }

  template <bool SILU>
  static CMFAST_INLINE Floats before_activation(Floats grad, Floats moved, Floats factor, Floats offset) {
    return SILU ? grad * silu_gradient(moved * factor + offset) : grad;
  }

  // Of B registers of adjacent channels: x from element `at` on, the others from channel c of so many positions on.
  template <bool SILU, int B>
  CMFAST_INLINE void sums_of_registers(const Sample& s, const NormTensor& t, int64_t at, int64_t begin, int64_t count,
                                       int64_t c, int lanes, float* to) const {
    Floats centre[B], factor[B], offset[B], dz_sum[B], dzx_sum[B];
    CMFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      centre[b] = load(s.centre + c + b * LANES, lanes);
      factor[b] = load(s.factor + c + b * LANES, lanes);
      offset[b] = load(s.offset + c + b * LANES, lanes);
      dz_sum[b] = dzx_sum[b] = zeros();
    }
    int64_t grad = s.n * p.grad.n + begin * p.grad.p + c, dx = s.n * p.dx.n + begin * p.dx.p + c;
    for (int64_t i = 0; i < count; ++i, at += t.p, grad += p.grad.p, dx += p.dx.p)
      CMFAST_UNROLL
      for (int b = 0; b < B; ++b) {
        prefetch(t.data, at + b * LANES + chunk * t.p);  // the next chunk's: no prefetcher sees so many strides ahead
        prefetch(p.grad.data, grad + b * LANES + chunk * p.grad.p);
        Floats moved = load(t.data, p.dtype, at + b * LANES, lanes) - centre[b];
        Floats dz = before_activation<SILU>(load(p.grad.data, p.dtype, grad + b * LANES, lanes), moved, factor[b],
                                            offset[b]);
        if (SILU && kept) store((float*)p.dx.data + dx + b * LANES, dz, lanes);
        dz_sum[b] += dz;
        dzx_sum[b] += dz * moved;
      }
    CMFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      store(to + c + b * LANES, dz_sum[b], lanes);
      store(to + channels + c + b * LANES, dzx_sum[b], lanes);
    }
  }

  template <bool SILU>
  void sums_of_rows(const Sample& s, const NormTensor& t, int64_t base, int64_t k) const {
    int64_t begin = k * chunk, count = at_most(p.positions - begin, chunk), at = s.n * t.n + begin * t.p, c = 0;
    float* to = s.parts + k * 2 * channels;
    for (; c + 2 * LANES <= t.channels; c += 2 * LANES)
      sums_of_registers<SILU, 2>(s, t, at + c, begin, count, base + c, LANES, to);
    for (; c < t.channels && !(FAULT(tail_of_channels_missed) && c + LANES > t.channels); c += LANES)
      sums_of_registers<SILU, 1>(s, t, at + c, begin, count, base + c, (int)at_most(t.channels - c, LANES), to);
  }

  template <bool SILU>
  void sums_of_plane(const Sample& s, const NormTensor& t, int64_t base, int64_t c) const {
    int64_t x = s.n * t.n + c * t.c, grad = s.n * p.grad.n + (base + c) * p.grad.c;
    int64_t dx = s.n * p.dx.n + (base + c) * p.dx.c;
    Floats centre = all(s.centre[base + c]), factor = all(s.factor[base + c]), offset = all(s.offset[base + c]);
    for (int64_t k = 0; k < chunks; ++k) {
      Floats dz_sum = zeros(), dzx_sum = zeros();
      for (int64_t i = k * chunk, end = at_most(i + chunk, p.positions); i < end; i += LANES) {
        int lanes = (int)at_most(end - i, LANES);  // beyond them the gradient is 0
        Floats moved = load(t.data, p.dtype, x + i, lanes) - centre;
        Floats dz = before_activation<SILU>(load(p.grad.data, p.dtype, grad + i, lanes), moved, factor, offset);
        if (SILU && kept) store((void*)p.dx.data, FLOAT32, dx + i, dz, lanes);
        dz_sum += dz;
        dzx_sum += dz * moved;
      }
      s.parts[k * 2 * channels + base + c] = sum(dz_sum);
      s.parts[(k * 2 + 1) * channels + base + c] = sum(dzx_sum);
    }
  }

  // ---- the second pass

  template <bool SILU>
  CMFAST_INLINE Floats gradient(Floats grad, Floats moved, Floats factor, Floats offset, Floats slope,
                                Floats constant) const {
    return before_activation<SILU>(grad, moved, factor, offset) * factor + (moved * slope + constant);
  }

  template <bool SILU>
  void gradient_of_rows(const Sample& s, const NormTensor& t, int64_t base, int64_t k) const {
    const NormTensor& from = kept ? p.dx : p.grad;
    int64_t begin = k * chunk, end = at_most(begin + chunk, p.positions);
    for (int64_t i = begin; i < end; ++i) {
      int64_t x = s.n * t.n + i * t.p, grad = s.n * from.n + i * from.p + base, dx = s.n * p.dx.n + i * p.dx.p + base;
      auto step = [&](int64_t c, int lanes) __attribute__((always_inline)) {
        int64_t r = base + c;
        Floats moved = load(t.data, p.dtype, x + c, lanes) - load(s.centre + r, lanes);
        Floats y = gradient<SILU>(load(from.data, p.dtype, grad + c, lanes), moved, load(s.factor + r, lanes),
                                  load(s.offset + r, lanes), load(s.slope + r, lanes), load(s.constant + r, lanes));
        store((void*)p.dx.data, p.dtype, dx + c, y, lanes);
      };
      int64_t c = 0;
      for (; c + LANES <= t.channels; c += LANES) step(c, LANES);
      if (c < t.channels) step(c, (int)(t.channels - c));
    }
  }

  template <bool SILU>
  void gradient_of_plane(const Sample& s, const NormTensor& t, int64_t base, int64_t c) const {
    const NormTensor& from = kept ? p.dx : p.grad;
    int64_t r = base + c, x = s.n * t.n + c * t.c, grad = s.n * from.n + r * from.c, dx = s.n * p.dx.n + r * p.dx.c;
    Floats centre = all(s.centre[r]), factor = all(s.factor[r]), offset = all(s.offset[r]);
    Floats slope = all(s.slope[r]), constant = all(s.constant[r]);
    for (int64_t i = 0; i < p.positions; i += LANES) {
      int lanes = (int)at_most(p.positions - i, LANES);
      Floats y = gradient<SILU>(load(from.data, p.dtype, grad + i, lanes),
                                load(t.data, p.dtype, x + i, lanes) - centre, factor, offset, slope, constant);
      store((void*)p.dx.data, p.dtype, dx + i, y, lanes);
    }
  }

  // ---- the pieces of a pass: chunks of positions, or channels

  int64_t pieces() const { return channels_last ? chunks : channels; }

  template <bool SILU>
  void sums(const Sample& s, int64_t i) const {
    piece(
        p, channels_last, i, [&](const auto&... work) { sums_of_rows<SILU>(s, work...); },
        [&](const auto&... work) { sums_of_plane<SILU>(s, work...); });
  }

  template <bool SILU>
  void write(const Sample& s, int64_t i) const {
    piece(
        p, channels_last, i, [&](const auto&... work) { gradient_of_rows<SILU>(s, work...); },
        [&](const auto&... work) { gradient_of_plane<SILU>(s, work...); });
  }

  void first_pass(const Sample& s, int64_t i) const { p.silu ? sums<true>(s, i) : sums<false>(s, i); }
  void second_pass(const Sample& s, int64_t i) const { p.silu && !kept ? write<true>(s, i) : write<false>(s, i); }

  // ---- the threads

  // Units of a thread's own: samples, or in NCHW groups.
  int64_t units() const { return p.samples * (channels_last ? 1 : p.groups); }

  void run_whole(Team team) const {
    Share mine = share(units(), team);
    int64_t together = channels_last ? p.groups : 1, pieces_of_unit = channels_last ? chunks : channels / p.groups;
    int64_t n = mine.begin * together / p.groups, first = mine.begin * together % p.groups - together;
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      first += together;
      if (first == p.groups) first = 0, ++n;
      Sample s = sample(n, team.rank);
      for (int64_t g = first; g < first + together; ++g) fold(s, g);
      for (int64_t i = 0; i < pieces_of_unit; ++i) first_pass(s, first * pieces_of_unit + i);
      for (int64_t g = first; g < first + together; ++g) merge(s, g);
      for (int64_t i = 0; i < pieces_of_unit; ++i) second_pass(s, first * pieces_of_unit + i);
    }
  }

  void run_shared(Team team) const {
    Share groups = share(p.samples * p.groups, team), mine = share(p.samples * pieces(), team);
    each_of(groups, p.groups, [&](int64_t n, int64_t g) { fold(sample(n, n), g); });
    team.barrier();
    each_of(mine, pieces(), [&](int64_t n, int64_t i) { first_pass(sample(n, n), i); });
    team.barrier();
    each_of(groups, p.groups, [&](int64_t n, int64_t g) { merge(sample(n, n), g); });
    team.barrier();
    each_of(mine, pieces(), [&](int64_t n, int64_t i) { second_pass(sample(n, n), i); });
  }
};

}  // namespace

const char* group_norm_backward(const NormBackwardArguments& p) {
  int64_t channels = p.h.channels + p.skip.channels;
  if (p.samples <= 0 || channels <= 0 || p.positions <= 0) return "the input has no elements";
  if (p.groups <= 0 || channels % p.groups) return "the number of groups must divide that of the channels";
  bool rows = true, planes = true;
  const NormTensor* const tensors[] = {&p.grad, &p.h, &p.skip, &p.dx};
  for (const NormTensor* t : tensors) {
    rows = rows && adjacent_channels(*t);
    planes = planes && adjacent_positions(*t, p.positions);
  }
  if (!rows && !planes) return "the channels, or the positions, of all tensors must be adjacent in memory";
  Gradient gradient{p, channels, 0, 0, rows && (channels > 1 || !planes), false, nullptr};
  gradient.chunk = gradient.channels_last ? CHUNK_OF_ROWS : CHUNK_OF_PLANE;
  gradient.chunks = (p.positions + gradient.chunk - 1) / gradient.chunk;
  int64_t elements = p.samples * channels * p.positions, units = gradient.units();
  int threads = elements < SMALL ? 1 : p.threads;
  bool whole = divides(units, threads);
  gradient.kept = whole && p.silu && p.dtype == FLOAT32 && elements / units <= KEPT;
  gradient.memory = (float*)scratch(SCRATCH_STATISTICS, (whole ? threads : p.samples) * gradient.floats() * 4);
  if (!gradient.memory) return "no memory for the sums";
  auto body = [&](Team team) { whole ? gradient.run_whole(team) : gradient.run_shared(team); };
  parallel(threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

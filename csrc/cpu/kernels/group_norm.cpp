// Group norm with what surrounds it, in two passes over the input: statistics, then one multiply-add a channel that
// folds weight, bias and FiLM, and the activation.
//
// Each channel of a chunk of positions has its mean and its sum of squared deviations, taken less the chunk's first
// value: however large the mean, no more is lost than the chunk is long. A group's are merged from these in float64
// (Chan, Golub and LeVeque 1983), in one order whatever the number of threads. `add` moves a channel's mean, and is
// added nowhere else.
//
// Moments that are given are those of one chunk, the whole of a sample, and the first pass is left out.
//
// In NHWC a register holds neighbouring channels, in NCHW neighbouring positions of a channel. A pair is two inputs
// whose channels follow one another.
//
// A thread takes whole samples where there are enough, or in NCHW whole groups: the second pass finds in its cache what
// the first one read. Otherwise the threads share the pieces of each pass: chunks of positions in NHWC, channels in NCHW.
#include "../faults.h"
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../norm_rows.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t LONGEST_CHUNK = 256, CHUNK_OF_PLANE = 64 * LANES;  // positions: a lane adds 256, or 64
constexpr int64_t SMALL = 1 << 13;  // elements that one thread takes sooner than two

struct Norm {
  const NormArguments& p;
  int64_t channels, chunk, chunks;
  int64_t part, parts;              // the chunks that statistics are of
  float *means, *deviations;        // [N, parts, C]
  float *centre, *gain, *offset;    // [N, C]
  bool channels_last;

  // ---- statistics

  void statistics_of_rows(int64_t n, const NormTensor& t, int64_t base, int64_t k) const {
    int64_t begin = k * chunk, end = at_most(begin + chunk, p.positions), to = (n * chunks + k) * channels + base;
    moments_of_rows(t.data, p.dtype, n * t.n + begin * t.p, t.p, end - begin, t.channels, means + to, deviations + to);
  }

  void statistics_of_plane(int64_t n, const NormTensor& t, int64_t base, int64_t c) const {
    constexpr int TOGETHER = 4;  // since each addition waits for the one before it
    const int64_t at = n * t.n + c * t.c;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t begin = k * chunk, end = at_most(begin + chunk, p.positions);
      const Floats first = all(load(t.data, p.dtype, at + begin, 1)[0]);
      Moments moments[TOGETHER];
      for (Moments& m : moments) m.begin(first);
      int64_t i = begin;
      for (; i + TOGETHER * LANES <= end; i += TOGETHER * LANES)
        CMFAST_UNROLL
        for (int j = 0; j < TOGETHER; ++j) moments[j].add(load(t.data, p.dtype, at + i + j * LANES));
      for (; i + LANES <= end; i += LANES) moments[0].add(load(t.data, p.dtype, at + i));
      if (i < end)
        moments[1].add((Ints)iota() < (int)(end - i) ? load(t.data, p.dtype, at + i, (int)(end - i)) : first);
      Floats s1 = (moments[0].s1 + moments[1].s1) + (moments[2].s1 + moments[3].s1);
      Floats s2 = (moments[0].s2 + moments[1].s2) + (moments[2].s2 + moments[3].s2);
      int64_t to = (n * chunks + k) * channels + base + c;
      Moments{first, all(sum(s1)), all(sum(s2))}.finish(means + to, deviations + to, end - begin, 1);
    }
  }

  void take_moments(const ChannelMoments& m, int64_t base, int64_t n) const {
    if (!m.data) return;
    const float* from = m.data + n * 2 * m.channels;
    __builtin_memcpy(means + n * channels + base, from, m.channels * sizeof(float));
    __builtin_memcpy(deviations + n * channels + base, from + m.channels, m.channels * sizeof(float));
  }

  void take_moments(int64_t n) const {
    take_moments(p.moments, 0, n);
    take_moments(p.skip_moments, FAULT(second_moments_from_zero) ? 0 : p.h.channels, n);
  }

  // ---- a group's mean and deviation, and what its channels are multiplied by and moved by

  // Chan, Golub and LeVeque 1983, with the means taken less one of them: in float64 nothing is lost by it, since what is
  // far from that one mean adds as much to the variance.
  void merge(int64_t n, int64_t g) const {
    const int64_t size = channels / p.groups, begin = g * size, end = begin + size;
    const float *const m = means + n * parts * channels, *const s = deviations + n * parts * channels;
    const double pivot = (double)m[begin] + (p.add.data ? (double)p.add.data[n * p.add.stride + begin] : 0.0);
    Doubles sums{}, squares{}, within{};
    each_half(begin, end, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const Doubles moved = row(p.add, n, c, lanes, 0) - pivot;
      Doubles inside{};
      for (int i = 0; i < HALF_LANES; ++i) inside[i] = i < lanes;
      for (int64_t k = 0; k < parts; ++k) {
        const double count = (double)at_most(part, p.positions - k * part);
        Doubles apart = (load_wide(m + k * channels + c, lanes) + moved) * inside;
        sums += apart * count;
        squares += apart * apart * count;
        within += load_wide(s + k * channels + c, lanes);
      }
    });
    const double elements = (double)size * (double)p.positions, total = sum(sums);
    const double mean = pivot + total / elements;
    const double between = FAULT(variance_not_merged) ? 0.0 : sum(squares) - total * total / elements;
    const double variance = (sum(within) + between) / elements;
    const double rstd = 1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + (double)p.eps);
    if (p.mean) p.mean[n * p.groups + g] = (float)mean;
    if (p.rstd) p.rstd[n * p.groups + g] = (float)rstd;
    // (x + add − mean)·rstd is taken as (x − centre)·gain: of a large mean, what is left is small and exact.
    each_half(begin, end, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const Doubles film = 1.0 + row(p.scale, n, c, lanes, 0), middle = mean - row(p.add, n, c, lanes, 0);
      const Doubles factor = rstd * row(p.weight, 0, c, lanes, 1) * film;
      const Doubles near = wide(narrow(middle));
      const Doubles moved = row(p.bias, 0, c, lanes, 0) * film + row(p.shift, n, c, lanes, 0);
      store_narrow(centre + n * channels + c, near, lanes);
      store_narrow(gain + n * channels + c, factor, lanes);
      store_narrow(offset + n * channels + c, moved - (middle - near) * factor, lanes);
    });
  }

  // ---- the output

  template <bool SILU>
  static CMFAST_INLINE Floats apply(Floats x, Floats middle, Floats factor, Floats moved, int dtype) {
    Floats y[1] = {(x - middle) * factor + moved};
    if (SILU && dtype == BFLOAT16) silu_to_bfloat16(y);
    else if (SILU) y[0] = silu(y[0]);
    return y[0];
  }

  template <bool SILU, int DTYPE>
  void apply_to_rows(int64_t n, const NormTensor& t, int64_t base, int64_t k) const {
    const int64_t end = at_most((k + 1) * chunk, p.positions), row = n * channels + base, count = t.channels;
    // Copies, which the compiler knows that no store changes.
    const float *const middles = centre + row, *const factors = gain + row, *const moves = offset + row;
    const void* const x = t.data;
    void* const y = (void*)p.y.data;
    for (int64_t i = k * chunk; i < end; ++i) {
      int64_t from = n * t.n + i * t.p, to = n * p.y.n + i * p.y.p + base, c = 0;
      for (; c + LANES <= count; c += LANES)
        store(y, DTYPE, to + c,
              apply<SILU>(load(x, DTYPE, from + c), load(middles + c), load(factors + c), load(moves + c), DTYPE), LANES);
      if (c < count) {
        int lanes = (int)(count - c);
        store(y, DTYPE, to + c,
              apply<SILU>(load(x, DTYPE, from + c, lanes), load(middles + c, lanes), load(factors + c, lanes),
                          load(moves + c, lanes), DTYPE),
              lanes);
      }
    }
  }

  template <bool SILU, int DTYPE>
  void apply_to_plane(int64_t n, const NormTensor& t, int64_t base, int64_t c) const {
    int64_t row = n * channels + base + c, from = n * t.n + c * t.c, to = n * p.y.n + (base + c) * p.y.c;
    Floats middle = all(centre[row]), factor = all(gain[row]), moved = all(offset[row]);
    for (int64_t i = 0; i < p.positions; i += LANES) {
      int lanes = (int)at_most(p.positions - i, LANES);
      Floats y = apply<SILU>(load(t.data, DTYPE, from + i, lanes), middle, factor, moved, DTYPE);
      store((void*)p.y.data, DTYPE, to + i, y, lanes);
    }
  }

  // ---- the pieces of a pass: chunks of positions, or channels

  int64_t pieces() const { return channels_last ? chunks : channels; }

  void first_pass(int64_t n, int64_t i) const {
    piece(
        p, channels_last, i, [&](const auto&... work) { statistics_of_rows(n, work...); },
        [&](const auto&... work) { statistics_of_plane(n, work...); });
  }

  template <bool SILU, int DTYPE>
  void second_pass(int64_t n, int64_t i) const {
    piece(
        p, channels_last, i, [&](const auto&... work) { apply_to_rows<SILU, DTYPE>(n, work...); },
        [&](const auto&... work) { apply_to_plane<SILU, DTYPE>(n, work...); });
  }

  // ---- the threads

  // Units of a thread's own: samples, or in NCHW groups.
  int64_t units() const { return p.samples * (channels_last ? 1 : p.groups); }

  template <bool SILU, int DTYPE>
  void run_whole(Team team) const {
    const int64_t groups = channels_last ? p.groups : 1, of_unit = channels_last ? chunks : channels / p.groups;
    Share mine = share(units(), team);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const int64_t n = u * groups / p.groups, first = u * groups % p.groups, from = channels_last ? 0 : first * of_unit;
      for (int64_t i = from; i < from + of_unit; ++i) first_pass(n, i);
      for (int64_t g = first; g < first + groups; ++g) merge(n, g);
      for (int64_t i = from; i < from + of_unit; ++i) second_pass<SILU, DTYPE>(n, i);
    }
  }

  template <bool SILU, int DTYPE>
  void run_shared(Team team) const {
    Share mine = share(p.samples * pieces(), team), groups = share(p.samples * p.groups, team);
    if (p.moments.data) each_of(share(p.samples, team), 1, [&](int64_t n, int64_t) { take_moments(n); });
    else each_of(mine, pieces(), [&](int64_t n, int64_t i) { first_pass(n, i); });
    team.barrier();
    each_of(groups, p.groups, [&](int64_t n, int64_t g) { merge(n, g); });
    team.barrier();
    each_of(mine, pieces(), [&](int64_t n, int64_t i) { second_pass<SILU, DTYPE>(n, i); });
  }

  template <bool SILU>
  void run(Team team, bool whole) const {
    if (p.dtype == FLOAT32) whole ? run_whole<SILU, FLOAT32>(team) : run_shared<SILU, FLOAT32>(team);
    else if (p.dtype == FLOAT16) whole ? run_whole<SILU, FLOAT16>(team) : run_shared<SILU, FLOAT16>(team);
    else whole ? run_whole<SILU, BFLOAT16>(team) : run_shared<SILU, BFLOAT16>(team);
  }
};

}  // namespace

const char* group_norm(const NormArguments& p) {
  Norm norm{p, p.h.channels + p.skip.channels, 0, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, false};
  int64_t channels = norm.channels;
  if (p.samples <= 0 || channels <= 0 || p.positions <= 0) return "the input has no elements";
  if (p.groups <= 0 || channels % p.groups) return "the number of groups must divide that of the channels";
  bool planes = adjacent_positions(p.h, p.positions) && adjacent_positions(p.skip, p.positions) &&
                adjacent_positions(p.y, p.positions);
  norm.channels_last = adjacent_channels(p.h) && adjacent_channels(p.skip) && adjacent_channels(p.y) &&
                       (channels > 1 || !planes);
  if (!norm.channels_last && !planes)
    return "the channels, or the positions, of all tensors must be adjacent in memory";
  // Of rows sixteen pieces or more for the threads to share, but not so short that merging them counts.
  norm.chunk = norm.channels_last ? at_most(at_least((p.positions + 15) / 16, 16), LONGEST_CHUNK) : CHUNK_OF_PLANE;
  norm.chunks = (p.positions + norm.chunk - 1) / norm.chunk;
  norm.part = p.moments.data ? p.positions : norm.chunk;
  norm.parts = p.moments.data ? 1 : norm.chunks;
  int64_t partial = p.samples * norm.parts * channels, rows = p.samples * channels;
  norm.means = (float*)scratch(SCRATCH_STATISTICS, (2 * partial + 3 * rows) * 4);
  if (!norm.means) return "no memory for the statistics";
  norm.deviations = norm.means + partial;
  norm.centre = norm.deviations + partial;
  norm.gain = norm.centre + rows;
  norm.offset = norm.gain + rows;
  const int threads = rows * p.positions < SMALL ? 1 : p.threads;
  const bool whole = !p.moments.data && divides(norm.units(), threads);
  auto body = [&](Team team) { p.silu ? norm.run<true>(team, whole) : norm.run<false>(team, whole); };
  parallel(threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

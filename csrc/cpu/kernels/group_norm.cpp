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
#include "../faults.h"
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t LONGEST_CHUNK = 256;

struct Norm {
  const NormArguments& p;
  int64_t channels, chunk, chunks;
  int64_t part, parts;              // the chunks that statistics are of
  float *means, *deviations;        // [N, parts, C]
  float *centre, *gain, *offset;    // [N, C]
  bool channels_last;

  // ---- statistics

  void statistics_of_rows(const NormTensor& t, int64_t base, int64_t n, int64_t k) const {
    int64_t begin = k * chunk, end = at_most(begin + chunk, p.positions), to = (n * chunks + k) * channels + base;
    moments_of_rows(t.data, p.dtype, n * t.n + begin * t.p, t.p, end - begin, t.channels, means + to, deviations + to);
  }

  void statistics_of_plane(const NormTensor& t, int64_t base, int64_t n, int64_t c) const {
    for (int64_t k = 0; k < chunks; ++k) {
      int64_t begin = k * chunk, end = at_most(begin + chunk, p.positions);
      int64_t at = n * t.n + c * t.c;
      Floats first = all(load(t.data, p.dtype, at + begin, 1)[0]);
      Moments moments;
      moments.begin(first);
      int64_t i = begin;
      for (; i + LANES <= end; i += LANES) moments.add(load(t.data, p.dtype, at + i));
      if (i < end)
        moments.add((Ints)iota() < (int)(end - i) ? load(t.data, p.dtype, at + i, (int)(end - i)) : first);
      moments.s1 = all(sum(moments.s1)), moments.s2 = all(sum(moments.s2));
      int64_t to = (n * chunks + k) * channels + base + c;
      moments.finish(means + to, deviations + to, end - begin, 1);
    }
  }

  void statistics_of_moments(const ChannelMoments& m, int64_t base, int64_t n) const {
    if (!m.data) return;
    const float* from = m.data + n * 2 * m.channels;
    __builtin_memcpy(means + n * channels + base, from, m.channels * sizeof(float));
    __builtin_memcpy(deviations + n * channels + base, from + m.channels, m.channels * sizeof(float));
  }

  // ---- a group's mean and deviation, and what its channels are multiplied by and moved by

  float row(const NormRow& r, int64_t n, int64_t c, float otherwise) const {
    return r.data ? r.data[n * r.stride + c] : otherwise;
  }

  void merge(int64_t n, int64_t g) const {
    int64_t size = channels / p.groups, from = g * size;
    double total = 0, mean, deviation = 0;
    const float* m = means + n * parts * channels;
    const float* s = deviations + n * parts * channels;
    for (int64_t k = 0; k < parts; ++k) {
      int64_t count = at_most(part, p.positions - k * part);
      double sum = 0;
      for (int64_t c = from; c < from + size; ++c) sum += (double)m[k * channels + c] + row(p.add, n, c, 0);
      total += sum * (double)count;
    }
    double elements = (double)size * (double)p.positions;
    mean = total / elements;
    for (int64_t k = 0; k < parts; ++k) {
      int64_t count = at_most(part, p.positions - k * part);
      double apart = 0;
      for (int64_t c = from; c < from + size; ++c) {
        double distance = (double)m[k * channels + c] + row(p.add, n, c, 0) - mean;
        apart += distance * distance;
        deviation += s[k * channels + c];
      }
      if (!FAULT(variance_not_merged)) deviation += apart * (double)count;
    }
    double rstd = 1.0 / __builtin_sqrt(deviation / elements + p.eps);
    if (p.mean) p.mean[n * p.groups + g] = (float)mean;
    if (p.rstd) p.rstd[n * p.groups + g] = (float)rstd;
    // (x + add − mean)·rstd is taken as (x − centre)·gain: of a large mean, what is left is small and exact.
    for (int64_t c = from; c < from + size; ++c) {
      double film = 1.0 + row(p.scale, n, c, 0);
      double factor = rstd * row(p.weight, 0, c, 1) * film, middle = mean - row(p.add, n, c, 0);
      centre[n * channels + c] = (float)middle;
      gain[n * channels + c] = (float)factor;
      offset[n * channels + c] = (float)(row(p.bias, 0, c, 0) * film + row(p.shift, n, c, 0) -
                                         (middle - (double)(float)middle) * factor);
    }
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
  void apply_to_rows(const NormTensor& t, int64_t base, int64_t n, int64_t k) const {
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

  template <bool SILU>
  void apply_to_plane(const NormTensor& t, int64_t base, int64_t n, int64_t c) const {
    int64_t row = n * channels + base + c, from = n * t.n + c * t.c, to = n * p.y.n + (base + c) * p.y.c;
    Floats middle = all(centre[row]), factor = all(gain[row]), moved = all(offset[row]);
    for (int64_t i = 0; i < p.positions; i += LANES) {
      int lanes = (int)at_most(p.positions - i, LANES);
      Floats y = apply<SILU>(load(t.data, p.dtype, from + i, lanes), middle, factor, moved, p.dtype);
      store((void*)p.y.data, p.dtype, to + i, y, lanes);
    }
  }

  // Every piece of work of a pass over the input, this thread's share: chunks of positions, or channels.
  template <class Rows, class Plane>
  void for_share(Team team, Rows rows, Plane plane) const {
    int64_t pieces = channels_last ? chunks : channels;
    Share mine = share(p.samples * pieces, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t n = i / pieces, piece = i % pieces;
      int64_t base = FAULT(second_input_from_zero) ? 0 : p.h.channels;
      if (channels_last) {
        rows(p.h, 0, n, piece);
        if (p.skip.data) rows(p.skip, base, n, piece);
      } else if (piece < p.h.channels) {
        plane(p.h, 0, n, piece);
      } else {
        plane(p.skip, base, n, piece - p.h.channels);
      }
    }
  }

  void statistics(Team team) const {
    if (!p.moments.data) {
      for_share(
          team, [&](const auto&... work) { statistics_of_rows(work...); },
          [&](const auto&... work) { statistics_of_plane(work...); });
      return;
    }
    Share mine = share(p.samples, team);
    for (int64_t n = mine.begin; n < mine.end; ++n) {
      statistics_of_moments(p.moments, 0, n);
      statistics_of_moments(p.skip_moments, FAULT(second_moments_from_zero) ? 0 : p.h.channels, n);
    }
  }

  void run(Team team) const {
    statistics(team);
    team.barrier();
    Share mine = share(p.samples * p.groups, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) merge(i / p.groups, i % p.groups);
    team.barrier();
    if (p.silu) apply_all<true>(team);
    else apply_all<false>(team);
  }

  template <bool SILU>
  void apply_all(Team team) const {
    if (p.dtype == FLOAT32) apply_all<SILU, FLOAT32>(team);
    else if (p.dtype == FLOAT16) apply_all<SILU, FLOAT16>(team);
    else apply_all<SILU, BFLOAT16>(team);
  }

  template <bool SILU, int DTYPE>
  void apply_all(Team team) const {
    for_share(
        team, [&](const auto&... work) { apply_to_rows<SILU, DTYPE>(work...); },
        [&](const auto&... work) { apply_to_plane<SILU>(work...); });
  }
};

bool adjacent_channels(const NormTensor& t) { return !t.data || t.c == 1 || t.channels == 1; }
bool adjacent_positions(const NormTensor& t, int64_t positions) { return !t.data || t.p == 1 || positions == 1; }

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
  // Sixteen pieces or more for the threads to share, but not so short that merging them counts.
  norm.chunk = at_most(at_least((p.positions + 15) / 16, 16), LONGEST_CHUNK);
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
  auto body = [&](Team team) { norm.run(team); };
  parallel(rows * p.positions < 8192 ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

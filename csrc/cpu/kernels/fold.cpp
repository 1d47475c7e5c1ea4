// Group norm of the moments of its channels, as a multiply-add a channel: a few thousand values, for one thread.
#include "../faults.h"
#include "../isa.h"
#include "../moments.h"
#include "../scratch.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

struct Fold {
  const FoldArguments& p;
  int64_t channels;
  double* means;      // [C], of the input with what is added to it
  float* deviations;  // [C]
  float* none;        // [C] zeros: the row that was not given, so that no loop has a choice in it

  const float* row(const NormRow& r, int64_t n) const { return r.data ? r.data + n * r.stride : none; }

  void gather(const ChannelMoments& m, int64_t base, int64_t n) const {
    const float* from = m.data + n * 2 * m.channels;
    const float* add = row(p.add, n);
    for (int64_t c = 0; c < m.channels; ++c) means[base + c] = (double)from[c] + (double)add[base + c];
    __builtin_memcpy(deviations + base, from + m.channels, m.channels * sizeof(float));
  }

  // Four sums at once, since each addition waits for the one before it.
  template <class Term>
  static double sum(int64_t begin, int64_t end, Term term) {
    double s[4] = {};
    int64_t c = begin;
    for (; c + 4 <= end; c += 4)
      for (int i = 0; i < 4; ++i) s[i] += term(c + i);
    for (; c < end; ++c) s[0] += term(c);
    return (s[0] + s[1]) + (s[2] + s[3]);
  }

  void fold(int64_t n, int64_t g) const {
    int64_t size = channels / p.groups, begin = g * size, end = begin + size;
    double mean = sum(begin, end, [&](int64_t c) { return means[c]; }) / (double)size;
    double within = sum(begin, end, [&](int64_t c) { return (double)deviations[c]; });
    double apart = sum(begin, end, [&](int64_t c) { return (means[c] - mean) * (means[c] - mean); });
    if (FAULT(variance_not_merged)) apart = 0;
    double variance = (within / (double)p.positions + apart) / (double)size;
    double rstd = 1.0 / __builtin_sqrt(variance + (double)p.eps);
    const float *add = row(p.add, n), *scale = row(p.scale, n), *shift = row(p.shift, n);
    const float *weight = p.weight.data, *bias = p.bias.data;
    float *__restrict gain = p.gain + n * channels, *__restrict offset = p.offset + n * channels;
    for (int64_t c = begin; c < end; ++c) {
      double film = 1.0 + (double)scale[c], factor = rstd * (double)weight[c] * film;
      gain[c] = (float)factor;
      offset[c] = (float)((double)bias[c] * film + (double)shift[c] - (mean - (double)add[c]) * factor);
    }
  }
};

}  // namespace

const char* fold_group_norm(const FoldArguments& p) {
  Fold fold{p, p.h.channels + p.skip.channels, nullptr, nullptr, nullptr};
  if (p.samples <= 0 || fold.channels <= 0 || p.positions <= 0) return "the moments are of no elements";
  if (p.groups <= 0 || fold.channels % p.groups) return "the number of groups must divide that of the channels";
  fold.means = (double*)scratch(SCRATCH_STATISTICS, fold.channels * (sizeof(double) + 2 * sizeof(float)));
  if (!fold.means) return "no memory for the statistics";
  fold.deviations = (float*)(fold.means + fold.channels);
  fold.none = fold.deviations + fold.channels;
  __builtin_memset(fold.none, 0, fold.channels * sizeof(float));
  for (int64_t n = 0; n < p.samples; ++n) {
    fold.gather(p.h, 0, n);
    if (p.skip.data) fold.gather(p.skip, FAULT(second_moments_from_zero) ? 0 : p.h.channels, n);
    for (int64_t g = 0; g < p.groups; ++g) fold.fold(n, g);
  }
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

// Means and sums of squared deviations: of each lane's values as they come, of rows of channels, and of parts merged.
#pragma once

#include "faults.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// Values are taken less the first one: however large their mean, no more is lost than they are many.
struct Moments {
  Floats first, s1, s2;
  CMFAST_INLINE void begin(Floats x) { first = x, s1 = s2 = zeros(); }
  CMFAST_INLINE void add(Floats x) {
    x -= first;
    s1 += x;
    s2 += x * x;
  }
  // Not inline: a compiler rounds a product before it is subtracted in one place, and not in another.
  __attribute__((noinline)) void finish(float* mean, float* deviation, int64_t count, int lanes) const {
    float inverse = 1.0f / (float)count;
    store(mean, FLOAT32, 0, first + s1 * inverse, lanes);
    // In this order the sums' square overflows where the sum of squares does, and what is no number stays.
    store(deviation, FLOAT32, 0, max(zeros(), s2 - s1 * (s1 * inverse)), lanes);
  }
};

// B registers of adjacent channels of so many rows, `stride` apart, from element `at` on.
template <int B>
CMFAST_INLINE void moments_of_registers(const void* data, int dtype, int64_t at, int64_t stride, int64_t count,
                                        int lanes, float* means, float* deviations) {
  Moments moments[B];
  CMFAST_UNROLL
  for (int b = 0; b < B; ++b) moments[b].begin(load(data, dtype, at + b * LANES, lanes));
  for (int64_t i = 0; i < count; ++i, at += stride)
    CMFAST_UNROLL
    for (int b = 0; b < B; ++b) moments[b].add(load(data, dtype, at + b * LANES, lanes));
  CMFAST_UNROLL
  for (int b = 0; b < B; ++b) moments[b].finish(means + b * LANES, deviations + b * LANES, count, lanes);
}

static inline void moments_of_rows(const void* data, int dtype, int64_t at, int64_t stride, int64_t count,
                                   int64_t channels, float* means, float* deviations) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES)
    moments_of_registers<4>(data, dtype, at + c, stride, count, LANES, means + c, deviations + c);
  for (; c + LANES <= channels; c += LANES)
    moments_of_registers<1>(data, dtype, at + c, stride, count, LANES, means + c, deviations + c);
  if (c < channels && !FAULT(tail_of_channels_missed))
    moments_of_registers<1>(data, dtype, at + c, stride, count, (int)(channels - c), means + c, deviations + c);
}

// The moments [2][channels] of what has the parts [parts][2][channels], part k of count(k) values (Chan, Golub and
// LeVeque 1983), in the order of the parts; of channels `begin` to `end`. A part of no values is not read.
template <class Count>
static void merge_moments(const float* from, int64_t parts, int64_t channels, int64_t begin, int64_t end, Count count,
                          float* to) {
  constexpr int64_t TOGETHER = 64;
  double elements = 0;
  for (int64_t k = 0; k < parts; ++k) elements += (double)count(k);
  double inverse = 1.0 / elements;
  for (int64_t c = begin; c < end; c += TOGETHER) {
    int64_t here = end - c < TOGETHER ? end - c : TOGETHER;
    double mean[TOGETHER] = {}, deviation[TOGETHER] = {};
    for (int64_t k = 0; k < parts; ++k) {
      const float* part = from + k * 2 * channels + c;
      double share = (double)count(k) * inverse;
      if (share == 0) continue;
      for (int64_t j = 0; j < here; ++j) mean[j] += (double)part[j] * share;
    }
    for (int64_t k = 0; k < parts; ++k) {
      const float* part = from + k * 2 * channels + c;
      double weight = FAULT(moments_not_merged) ? 0.0 : (double)count(k);
      if (count(k) == 0) continue;
      for (int64_t j = 0; j < here; ++j) {
        double apart = (double)part[j] - mean[j];
        deviation[j] += (double)part[channels + j] + apart * apart * weight;
      }
    }
    for (int64_t j = 0; j < here; ++j) {
      to[c + j] = (float)mean[j];
      to[channels + c + j] = (float)deviation[j];
    }
  }
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

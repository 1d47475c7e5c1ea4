// The softmax of attention, block of keys after block of keys: scores become weights, relative to the largest score so far.
#pragma once

#include "attention_heads.h"
#include "faults.h"
#include "functions.h"

namespace cmfast {
namespace CMFAST_ISA {

template <bool PAIRS>
struct Softmax {
  static constexpr int64_t ROWS = Sizes<PAIRS>::ROWS;
  static constexpr int64_t QUERIES = 64;  // of a thread's piece of work at most, whole groups of rows
  static constexpr int64_t KEYS = 576;    // of a block, whole panels
  static constexpr int64_t SCORES = KEYS + 2 * BLOCK;  // of a query, and so far apart that rows do not meet in the cache

  // Of each query: the largest score so far, lane by lane the sum of its weights, and by how much the last block of keys
  // changed what was summed before.
  alignas(64) float most[QUERIES], changes[QUERIES];
  Floats totals[QUERIES];

  void begin() {
    for (int64_t i = 0; i < QUERIES; ++i) most[i] = -__builtin_inff(), totals[i] = zeros();
  }

  // Where a query's scores lie from key i on: sixteen of them are followed by as many of each other query of the group, so
  // that weights can take their place.
  static CMFAST_INLINE int64_t score(int64_t m, int64_t i) { return (i / BLOCK * ROWS + m) * BLOCK + i % BLOCK; }

  // Scores, whose largest is `most`, as weights 2^((score − most)·factor).
  template <int N>
  static CMFAST_INLINE void weigh(Floats (&x)[N], float most, float factor) {
    CMFAST_UNROLL
    for (int j = 0; j < N; ++j) x[j] = (x[j] - most) * factor;
    if constexpr (PAIRS) exp2_to_sums(x);
    else exp2(x);
  }

  // Rows and columns of LANES registers exchanged, one result a row: combine(register, register) of the columns.
  template <class Combine>
  static CMFAST_INLINE Floats across(Words (&rows)[LANES], Combine combine) {
    transpose(rows);
    Floats all_of_them = as_floats(rows[0]);
    for (int i = 1; i < LANES; ++i) all_of_them = combine(all_of_them, as_floats(rows[i]));
    return all_of_them;
  }

  static constexpr int TOGETHER = REGISTERS == 32 ? 4 : BLOCK / LANES;
  static constexpr int64_t STEP = TOGETHER * LANES;

  // The largest scores of a row, lane by lane.
  static Floats largest_of_row(const float* scores, int64_t m, int64_t count) {
    int64_t stepped = count / STEP * STEP;
    Floats top[TOGETHER];  // each waits for itself alone
    CMFAST_UNROLL
    for (int j = 0; j < TOGETHER; ++j) top[j] = all(-__builtin_inff());
    for (int64_t i = 0; i < stepped; i += STEP)
      CMFAST_UNROLL
      for (int j = 0; j < TOGETHER; ++j) top[j] = max(top[j], load(scores + score(m, i + j * LANES)));
    for (int64_t i = stepped; i < count; i += LANES)
      top[0] = max(top[0], (Ints)iota() < (int)(count - i) ? load(scores + score(m, i)) : top[0]);
    CMFAST_UNROLL
    for (int j = 1; j < TOGETHER; ++j) top[0] = max(top[0], top[j]);
    return top[0];
  }

  // Turn a row of scores into weights, and give their sums lane by lane. A weight of two bytes lies before the scores that are
  // still to be read.
  static Floats weigh_row(float* scores, int64_t m, int64_t count, float most, float factor) {
    int64_t stepped = count / STEP * STEP;
    Floats totals[TOGETHER];
    CMFAST_UNROLL
    for (int j = 0; j < TOGETHER; ++j) totals[j] = zeros();
    for (int64_t i = 0; i < stepped; i += STEP) {
      Floats weights[TOGETHER];
      CMFAST_UNROLL
      for (int j = 0; j < TOGETHER; ++j) weights[j] = load(scores + score(m, i + j * LANES));
      weigh(weights, most, factor);
      CMFAST_UNROLL
      for (int j = 0; j < TOGETHER; j += 2) {
        totals[j] += weights[j];
        totals[j + 1] += weights[j + 1];
        put_row<PAIRS>(scores, i + j * LANES, m, weights[j], weights[j + 1]);
      }
    }
    for (int64_t i = stepped; i < round_up(count, 2 * BLOCK); i += LANES) {
      int left = (int)(FAULT(tail_of_keys_attended) ? LANES : count - i);
      Floats weight[1] = {load(scores + score(m, i))};
      weigh(weight, most, factor);
      weight[0] = (Ints)iota() < left ? weight[0] : zeros();
      totals[0] += weight[0];
      put_row<PAIRS>(scores, i, m, weight[0]);
    }
    CMFAST_UNROLL
    for (int j = 1; j < TOGETHER; ++j) totals[0] += totals[j];
    return totals[0];
  }

  // The scores of `queries` with a block of keys become weights; those of a group of queries lie behind those of the group
  // before. `factor`: of the scores, in powers of 2.
  void block(float* scores, int64_t queries, int64_t count, float factor) {
    for (int64_t i = 0; i < queries; i += LANES) rows(scores, i, at_most(queries - i, LANES), count, factor);
  }

  // The same of queries `first` on, LANES of them at most.
  void rows(float* scores, int64_t first, int64_t here, int64_t count, float factor) {
    auto of = [&](int64_t m) { return scores + m / ROWS * ROWS * SCORES; };
    Words rows[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      int64_t m = first + (i < here ? i : 0);
      rows[i] = bits(largest_of_row(of(m), m % ROWS, count));
    }
    const Floats before = load(most + first);
    const Floats next = max(before, across(rows, [](Floats x, Floats y) { return max(x, y); }));
    const Floats begun = before == -__builtin_inff() ? zeros() : all(1.0f);
    alignas(64) float tops[LANES];
    store(most + first, next);
    store(changes + first, begun == 0.0f ? zeros() : exp2((before - next) * factor));
    store(tops, next == -__builtin_inff() ? zeros() : next);  // weights of 0, not of NaN, where all scores so far are -inf
    for (int64_t i = 0, m = first; i < here; ++i, ++m) {
      Floats sums = weigh_row(of(m), m % ROWS, count, tops[i], factor);
      totals[m] = (FAULT(sum_not_rescaled) ? totals[m] : totals[m] * changes[m]) + sums;
    }
  }

  // What was summed of the values before the last block of keys, so many channels of each query, as the block has changed it.
  void rescale(float* out, int64_t queries, int64_t channels, int64_t row) const {
    if (FAULT(values_not_rescaled)) return;
    for (int64_t m = 0; m < queries; ++m)
      if (changes[m] != 1.0f)
        for (float* at = out + m * row; at < out + m * row + channels; at += LANES) store(at, load(at) * changes[m]);
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast

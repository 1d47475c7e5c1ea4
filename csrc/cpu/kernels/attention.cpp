// Attention without the matrix of scores: softmax(scale · q kᵀ) v, block of keys after block of keys, with the running
// maximum and sum of each query's row (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// The keys and values of each head are packed once into panels that the matrix products read from one end to the other.
// A thread then has 64 queries at a time: each panel that the first-level cache holds serves all of them. bfloat16 inputs
// are multiplied as they are and summed in float32, the weights p rounded to bfloat16 before they meet v; others are
// multiplied in float32, or rounded to bfloat16 first where that is asked for.
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

template <bool PAIRS>
struct Heads : Sizes<PAIRS> {
  using Sizes<PAIRS>::ROWS, Sizes<PAIRS>::PANEL, Sizes<PAIRS>::LONGEST_SUM, Sizes<PAIRS>::WHOLE, Sizes<PAIRS>::TILED;

  const AttentionArguments& p;
  int64_t size, keys;                    // the head size and the keys, filled up
  uint32_t *packed_k, *packed_v;         // of each head: panels of keys [size][48], panels of channels [keys][48]
  int64_t words_k, words_v;              // of each head
  static constexpr int64_t WORD = PAIRS ? 2 : 1;  // elements
  static constexpr int64_t QUERIES = TILED ? ROWS : 64;  // of a thread's piece of work at most, whole groups of rows
  static constexpr int64_t KEYS = TILED ? 512 : 576;  // of a block, whole panels; for tiles, a row's fit the first cache
  static constexpr int64_t SCORES = KEYS + 2 * BLOCK;  // of a query, and so far apart that rows do not meet in the cache

  Heads(const AttentionArguments& p) : p(p), size(round_up(p.head_size, WHOLE)), keys(round_up(p.keys, WHOLE)) {
    words_k = words_v = size * keys / WORD;
  }

  // A register of elements that are `stride` apart, of which `count` are to be had; 0 for the others.
  CMFAST_INLINE Floats some(const void* data, int64_t at, int64_t stride, int64_t count) const {
    return count > 0 ? gather(data, p.dtype, at, stride, (int)at_most(count, LANES)) : zeros();
  }

  // Of the matrix whose element (k, j) is data[at + k·down + j·across]: words k / WORD of a register of columns, of
  // which there are `columns`, as there are `rows`.
  CMFAST_INLINE Words row_of_words(const void* data, int64_t at, int64_t down, int64_t across, int64_t k, int64_t rows,
                                   int64_t columns) const {
    Floats row = some(data, at + k * down, across, k < rows ? columns : 0);
    if constexpr (!PAIRS) return bits(row);
    Floats next = some(data, at + (k + 1) * down, across, k + 1 < rows ? columns : 0);
    return to_bfloat16(row) | to_bfloat16(next) << 16;
  }

  // The same of a column whose elements adjoin: words k / WORD on, by way of `line`.
  CMFAST_INLINE Words column_of_words(const void* data, int64_t at, int64_t k, int64_t rows, uint16_t* line) const {
    Floats first = some(data, at + k, 1, rows - k);
    if constexpr (!PAIRS) return bits(first);
    store_bfloat16(line, first);
    store_bfloat16(line + LANES, some(data, at + k + LANES, 1, rows - k - LANES));
    return *(const WordsThere*)line;
  }

  // Panels of that matrix.
  void pack(uint32_t* to, const void* data, int64_t at, int64_t down, int64_t across, int64_t rows, int64_t columns,
            int64_t padded_rows) const {
    int64_t words = padded_rows / WORD;
    alignas(64) uint16_t line[2 * LANES];
    for (int64_t j = 0; j < columns; j += PANEL) {
      int64_t width = at_most(round_up(columns - j, WHOLE), PANEL);
      for (int64_t b = 0; b < width; b += LANES, at += LANES * across) {
        int64_t here = columns - j - b;
        if (down == 1 && across != 1) {
          for (int64_t w = 0; w < words; w += LANES) {
            Words square[LANES];
            CMFAST_UNROLL
            for (int64_t i = 0; i < LANES; ++i)
              square[i] = column_of_words(data, at + i * across, w * WORD, i < here ? rows : 0, line);
            transpose(square);
            int64_t there = at_most(words - w, LANES);
            for (int64_t i = 0; i < there; ++i) *(WordsThere*)(to + (w + i) * width + b) = square[i];
          }
        } else {
          for (int64_t w = 0; w < words; ++w)
            *(WordsThere*)(to + w * width + b) = row_of_words(data, at, down, across, w * WORD, rows, here);
        }
      }
      to += words * width;
    }
  }

  // The keys of a head, or its values.
  void pack_head(int64_t head, bool keys_of_it) const {
    int64_t n = head / p.heads, h = head % p.heads;
    if (keys_of_it)
      pack(packed_k + head * words_k, p.k.data, n * p.k.n + h * p.k.h, p.k.d, p.k.t, p.head_size, p.keys, size);
    else pack(packed_v + head * words_v, p.v.data, n * p.v.n + h * p.v.h, p.v.t, p.v.d, p.keys, p.head_size, keys);
  }

  // A group of queries as the left operand, those beyond the last 0.
  void pack_queries(float* to, int64_t at, int64_t count) const {
    float sign = p.scale < 0 ? -1.0f : 1.0f;
    for (int64_t k = 0; k < size; k += LANES)
      for (int64_t m = 0; m < ROWS; ++m) {
        int64_t lanes = m < count ? at_most(p.head_size - k, LANES) : 0;
        Floats x = lanes > 0 ? sign * gather(p.q.data, p.dtype, at + m * p.q.t + k * p.q.d, p.q.d, (int)lanes) : zeros();
        put_row(to, k, m, x);
      }
  }

  // A register of a row of the left operand from element k on.
  static CMFAST_INLINE void put_row(float* to, int64_t k, int64_t m, Floats x) {
    if (PAIRS) store_bfloat16((uint16_t*)to + (k / 32 * ROWS + m) * 32 + k % 32, x);
    else store(to + (k / BLOCK * ROWS + m) * BLOCK + k % BLOCK, x);
  }

  // Where a query's scores lie from key i on: sixteen of them are followed by as many of each other query of the group, so
  // that weights can take their place. Those of tiles are a row.
  static CMFAST_INLINE int64_t score(int64_t m, int64_t i) {
    return TILED ? m * SCORES + i : (i / BLOCK * ROWS + m) * BLOCK + i % BLOCK;
  }

  template <int N>
  static CMFAST_INLINE void exponentials(Floats (&x)[N]) {
    if (TILED) exp2_of_negative(x);
    else exp2(x);
  }

  // What is known of a piece of queries so far: the largest score of each, and lane by lane the sum of its weights.
  struct Softmax {
    alignas(64) float most[QUERIES];
    Floats totals[QUERIES];
  };

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

  // Turn a row of scores into weights, and give their sums lane by lane. Weights may lie where the scores do: one of two
  // bytes lies before the scores that are still to be read.
  static Floats weigh_row(const float* scores, float* to, int64_t m, int64_t count, float most, float factor) {
    int64_t stepped = count / STEP * STEP;
    Floats totals[TOGETHER];
    CMFAST_UNROLL
    for (int j = 0; j < TOGETHER; ++j) totals[j] = zeros();
    for (int64_t i = 0; i < stepped; i += STEP) {
      Floats weights[TOGETHER];
      CMFAST_UNROLL
      for (int j = 0; j < TOGETHER; ++j) weights[j] = (load(scores + score(m, i + j * LANES)) - most) * factor;
      exponentials(weights);
      CMFAST_UNROLL
      for (int j = 0; j < TOGETHER; ++j) {
        totals[j] += weights[j];
        put_row(to, i + j * LANES, m, weights[j]);
      }
    }
    for (int64_t i = stepped; i < round_up(count, 2 * BLOCK); i += LANES) {
      int left = (int)(FAULT(tail_of_keys_attended) ? LANES : count - i);
      Floats weight[1] = {(load(scores + score(m, i)) - most) * factor};
      exponentials(weight);
      weight[0] = (Ints)iota() < left ? weight[0] : zeros();
      totals[0] += weight[0];
      put_row(to, i, m, weight[0]);
    }
    CMFAST_UNROLL
    for (int j = 1; j < TOGETHER; ++j) totals[0] += totals[j];
    return totals[0];
  }

  // Queries `first` on, LANES of them or as many as there are: their scores of a block of keys become weights, and what was
  // summed before is rescaled by the change of the largest score.
  void softmax(float* scores, float* weights, int64_t first, int64_t queries, int64_t count, float* out,
               Softmax& known) const {
    constexpr int64_t GROUP = TILED ? KEYS / WORD : SCORES;
    const float factor = __builtin_fabsf(p.scale) * 1.44269504f;
    const int64_t here = at_most(queries - first, LANES);
    auto of = [&](float* data, int64_t m, int64_t group) { return data + m / ROWS * ROWS * group; };
    Words rows[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      int64_t m = first + (i < here ? i : 0);
      rows[i] = bits(largest_of_row(of(scores, m, SCORES), m % ROWS, count));
    }
    const Floats before = load(known.most + first);
    const Floats next = max(before, across(rows, [](Floats x, Floats y) { return max(x, y); }));
    const Floats begun = before == -__builtin_inff() ? zeros() : all(1.0f);
    const Floats change = begun == 0.0f ? zeros() : exp2((before - next) * factor);
    alignas(64) float changes[LANES], tops[LANES];
    store(known.most + first, next);
    store(changes, change);
    store(tops, next == -__builtin_inff() ? zeros() : next);  // weights of 0, not of NaN, where all scores so far are -inf
    for (int64_t i = 0, m = first; i < here; ++i, ++m) {
      Floats sums = weigh_row(of(scores, m, SCORES), of(weights, m, GROUP), m % ROWS, count, tops[i], factor);
      known.totals[m] = (FAULT(sum_not_rescaled) ? known.totals[m] : known.totals[m] * changes[i]) + sums;
      if (changes[i] != 1.0f && changes[i] != 0.0f)
        for (int64_t k = 0; k < p.head_size; k += LANES) {
          float* at = out + m * size + k;
          store(at, load(at) * changes[i]);
        }
    }
  }

  // Floats that a thread needs: the queries, their scores, the sums.
  int64_t rows() const { return QUERIES * (2 * size + SCORES + (TILED ? KEYS / WORD : 0)); }

  void attend(int64_t head, int64_t first, int64_t piece, float* q) const {
    int64_t n = head / p.heads, h = head % p.heads, count = at_most(p.queries - first, piece);
    if (FAULT(last_queries_missed) && count % ROWS) --count;
    float *scores = q + QUERIES * size, *out = scores + QUERIES * SCORES;
    float* const weights = TILED ? out + QUERIES * size : scores;  // of a group of queries after that of another
    constexpr int64_t GROUP = TILED ? KEYS / WORD : SCORES;
    Softmax known;
    for (int64_t i = 0; i < QUERIES; ++i) known.most[i] = -__builtin_inff(), known.totals[i] = zeros();
    for (int64_t i = 0; i < count; i += ROWS)
      pack_queries(q + i * size, n * p.q.n + h * p.q.h + (first + i) * p.q.t, count - i);
    for (int64_t from = 0; from < p.keys; from += KEYS) {
      int64_t here = at_most(p.keys - from, KEYS), padded = round_up(here, WHOLE);
      // What is read of keys and values stays in the first cache while it meets all queries.
      for (int64_t j = 0; j < padded; j += PANEL)
        for (int64_t i = 0; i < count; i += ROWS)
          multiply_panel<PAIRS>((const uint32_t*)(q + i * size), packed_k + head * words_k + (from + j) * size / WORD,
                                (int)at_most(padded - j, PANEL), (TILED ? size : p.head_size + WORD - 1) / WORD,
                                {scores + i * SCORES + score(0, j), TILED ? SCORES : BLOCK, TILED ? BLOCK : ROWS * BLOCK, false},
                                {nullptr, 0});
      for (int64_t i = 0; i < count; i += LANES) softmax(scores, weights, i, count, here, out, known);
      const uint32_t* v = packed_v + head * words_v;
      for (int64_t j = 0; j < size; j += PANEL) {
        int64_t width = at_most(size - j, PANEL), columns = round_up(p.head_size - j, LANES);
        for (int64_t k = 0, words; k < padded / WORD; k += words) {
          words = at_most(padded / WORD - k, LONGEST_SUM);
          for (int64_t i = 0; i < count; i += ROWS)
            multiply_panel<PAIRS>((const uint32_t*)(weights + i * GROUP) + k * ROWS, v + (from / WORD + k) * width,
                                  (int)width, words, {out + i * size + j, size, BLOCK, from + k > 0}, {nullptr, 0},
                                  ROWS, (int)columns);
        }
        v += keys * width / WORD;
      }
    }
    for (int64_t i = 0; i < count; i += LANES) {
      Words rows[LANES];
      for (int j = 0; j < LANES; ++j) rows[j] = bits(known.totals[i + j]);
      const Floats total = across(rows, [](Floats x, Floats y) { return x + y; });
      alignas(64) float inverse[LANES], lse[LANES];
      store(inverse, 1.0f / total);
      store(lse, load(known.most + i) * __builtin_fabsf(p.scale) + log(total));
      for (int64_t j = 0; j < at_most(count - i, LANES); ++j) {
        int64_t at = n * p.out.n + h * p.out.h + (first + i + j) * p.out.t;
        for (int64_t k = 0; k < p.head_size; k += LANES)
          scatter((void*)p.out.data, p.dtype, at + k * p.out.d, p.out.d, load(out + (i + j) * size + k) * inverse[j],
                  (int)at_most(p.head_size - k, LANES));
        p.lse[head * p.queries + first + i + j] = lse[j];
      }
    }
  }

  const char* run() {
    int64_t heads = p.samples * p.heads;
    packed_k = (uint32_t*)scratch(SCRATCH_INPUT, heads * (words_k + words_v) * 4);
    float* floats = (float*)scratch(SCRATCH_ROWS, p.threads * rows() * 4);
    if (!packed_k || !floats) return "no memory for the packed keys and values";
    packed_v = packed_k + heads * words_k;
    bool small = heads * p.queries * p.keys * size < (3 << 16);  // a second thread would come when all is done
    int threads = small ? 1 : p.threads;
    int64_t piece = QUERIES;  // of queries, so that threads have the same number of them
    while (piece > 2 * ROWS && heads * ((p.queries + piece - 1) / piece) % threads) piece /= 2;
    int64_t groups = (p.queries + piece - 1) / piece;
    auto body = [&](Team team) {
      TileUse tiles;
      Share mine = share(2 * heads, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack_head(i / 2, i % 2 == 0);
      team.barrier();
      mine = share(heads * groups, team);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        attend(i / groups, i % groups * piece, piece, floats + team.rank * rows());
    };
    parallel(threads, body);
    return nullptr;
  }
};

}  // namespace

const char* attention(const AttentionArguments& p) {
  if (p.samples <= 0 || p.heads <= 0 || p.queries <= 0 || p.keys <= 0 || p.head_size <= 0) return "a size is not positive";
  return p.pairs || p.dtype == BFLOAT16 ? Heads<true>(p).run() : Heads<false>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

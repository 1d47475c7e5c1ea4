// Attention without the matrix of scores: softmax(scale · q kᵀ) v, block of keys after block of keys, with the running
// maximum and sum of each query's row (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// The keys and values of each head are packed once into panels that the matrix products read from one end to the other.
// A thread then has 64 queries at a time, so that a block of keys that fits in the second-level cache serves all of
// them. bfloat16 inputs are multiplied as they are and summed in float32, the weights p rounded to bfloat16 before they
// meet v; float16 inputs are multiplied in float32.
#include "../functions.h"
#include "../isa.h"
#include "../matrix.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t QUERIES = 64;        // of a thread's piece of work, a multiple of ROWS
constexpr int64_t KEYS = 10 * PANEL;   // of a block

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

template <bool PAIRS>
struct Heads {
  const AttentionArguments& p;
  int64_t size, keys;                    // the head size and the keys, whole blocks of 16
  uint32_t *packed_k, *packed_v;         // of each head: panels of keys [size][48], panels of channels [keys][48]
  int64_t words_k, words_v;              // of each head
  static constexpr int64_t WORD = PAIRS ? 2 : 1;  // elements

  Heads(const AttentionArguments& p) : p(p), size(round_up(p.head_size, BLOCK)), keys(round_up(p.keys, BLOCK)) {
    words_k = words_v = size * keys / WORD;
  }

  // An element of a panel that is `width` wide; k counts down its rows.
  static void put(uint32_t* panel, int64_t width, int64_t k, int64_t j, const float* x, int64_t count) {
    if (PAIRS) {
      uint16_t* to = (uint16_t*)panel + (k / 2 * width + j) * 2 + k % 2;
      for (int64_t i = 0; i < count; ++i) {  // exact: the inputs are bfloat16
        uint32_t w;
        __builtin_memcpy(&w, x + i, 4);
        to[2 * i] = (uint16_t)(w >> 16);
      }
    } else {
      __builtin_memcpy(panel + k * width + j, x, 4 * count);
    }
  }

  // Panels of the matrix whose element (k, j) is data[at + k·down + j·across], zeros beyond its rows and columns.
  void pack(uint32_t* to, const void* data, int64_t at, int64_t down, int64_t across, int64_t rows, int64_t columns,
            int64_t padded_rows) const {
    alignas(64) float line[PANEL], square[BLOCK][BLOCK];
    for (int64_t j = 0; j < columns; j += PANEL) {
      int64_t width = at_most(round_up(columns - j, BLOCK), PANEL), here = at_most(columns - j, width);
      if (down == 1 && across != 1) {  // transposed, a square of 16 at a time
        for (int64_t b = 0; b < width; b += BLOCK)
          for (int64_t k = 0; k < padded_rows; k += BLOCK) {
            for (int64_t i = 0; i < BLOCK; ++i)
              for (int64_t l = 0; l < BLOCK; l += LANES) {
                int64_t lanes = b + i < here ? at_most(rows - k - l, LANES) : 0;
                store(square[i] + l, lanes > 0 ? load(data, p.dtype, at + k + l + (j + b + i) * across, (int)lanes)
                                               : zeros());
              }
            for (int64_t l = 0; l < BLOCK; ++l) {
              for (int64_t i = 0; i < BLOCK; ++i) line[i] = square[i][l];
              put(to, width, k + l, b, line, BLOCK);
            }
          }
      } else {
        for (int64_t k = 0; k < padded_rows; ++k) {
          for (int64_t l = 0; l < width; l += LANES) {
            int64_t lanes = k < rows ? at_most(here - l, LANES) : 0;
            store(line + l, lanes > 0 ? gather(data, p.dtype, at + k * down + (j + l) * across, across, (int)lanes)
                                      : zeros());
          }
          put(to, width, k, 0, line, width);
        }
      }
      to += padded_rows * width / WORD;
    }
  }

  void pack_head(int64_t head) const {
    int64_t n = head / p.heads, h = head % p.heads;
    pack(packed_k + head * words_k, p.k.data, n * p.k.n + h * p.k.h, p.k.d, p.k.t, p.head_size, p.keys, size);
    pack(packed_v + head * words_v, p.v.data, n * p.v.n + h * p.v.h, p.v.t, p.v.d, p.keys, p.head_size, keys);
  }

  // Eight queries as the left operand, those beyond the last 0.
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

  // Turn a row of scores into weights, and rescale what was summed before by the change of the row's maximum.
  void softmax_row(float* scores, float* weights, int64_t m, int64_t count, float* out, float& most, float& total) const {
    const float factor = __builtin_fabsf(p.scale) * 1.44269504f;
    auto score = [&](int64_t i) { return load(scores + (i / BLOCK * ROWS + m) * BLOCK + i % BLOCK); };
    Floats top = all(most);
    int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) top = max(top, score(i));
    if (whole < count) top = max(top, (Ints)iota() < (int)(count - whole) ? score(whole) : top);
    float next = largest(top);
    Floats sums = zeros();
    for (int64_t i = 0; i < whole; i += LANES) {
      Floats weight = exp2((score(i) - next) * factor);
      sums += weight;
      put_row(weights, i, m, weight);
    }
    for (int64_t i = whole; i < round_up(count, 2 * BLOCK); i += LANES) {
      int left = (int)(FAULT(tail_of_keys_attended) ? LANES : count - i);
      Floats weight = (Ints)iota() < left ? exp2((score(i) - next) * factor) : zeros();
      sums += weight;
      put_row(weights, i, m, weight);
    }
    if (next != most) {
      float change = most == -__builtin_inff() ? 0.0f : exp2(all((most - next) * factor))[0];
      if (!FAULT(sum_not_rescaled)) total *= change;
      for (int64_t k = 0; k < size; k += LANES) store(out + k, load(out + k) * change);
      most = next;
    }
    total += sum(sums);
  }

  // Floats that a thread needs: the queries, the scores and the weights of eight of them, the sums.
  int64_t rows() const { return QUERIES * 2 * size + ROWS * 2 * (KEYS + 2 * BLOCK); }

  void attend(int64_t head, int64_t first, float* q) const {
    int64_t n = head / p.heads, h = head % p.heads, count = at_most(p.queries - first, QUERIES);
    if (FAULT(last_queries_missed) && count % ROWS) --count;
    float *scores = q + QUERIES * size, *weights = scores + ROWS * (KEYS + 2 * BLOCK);
    float* out = weights + ROWS * (KEYS + 2 * BLOCK);
    float most[QUERIES], total[QUERIES];
    for (int64_t i = 0; i < QUERIES; ++i) most[i] = -__builtin_inff(), total[i] = 0;
    for (int64_t i = 0; i < QUERIES * size; i += LANES) store(out + i, zeros());
    for (int64_t i = 0; i < count; i += ROWS)
      pack_queries(q + i * size, n * p.q.n + h * p.q.h + (first + i) * p.q.t, count - i);
    for (int64_t from = 0; from < p.keys; from += KEYS) {
      int64_t here = at_most(p.keys - from, KEYS), padded = round_up(here, BLOCK);
      for (int64_t i = 0; i < count; i += ROWS) {
        for (int64_t j = 0; j < padded; j += PANEL)
          multiply_panel<PAIRS>((const uint32_t*)(q + i * size), packed_k + head * words_k + (from + j) * size / WORD,
                                (int)at_most(padded - j, PANEL), size / WORD,
                                {scores + j * ROWS, BLOCK, ROWS * BLOCK, false}, {nullptr, 0});
        for (int64_t m = 0; m < at_most(count - i, ROWS); ++m)
          softmax_row(scores, weights, m, here, out + (i + m) * size, most[i + m], total[i + m]);
        const uint32_t* v = packed_v + head * words_v;
        for (int64_t j = 0; j < size; j += PANEL) {
          int64_t width = at_most(size - j, PANEL);
          multiply_panel<PAIRS>((const uint32_t*)weights, v + from * width / WORD, (int)width, padded / WORD,
                                {out + i * size + j, size, BLOCK, true}, {nullptr, 0});
          v += keys * width / WORD;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = n * p.out.n + h * p.out.h + (first + i) * p.out.t;
      Floats inverse = all(1.0f / total[i]);
      for (int64_t k = 0; k < p.head_size; k += LANES)
        scatter((void*)p.out.data, p.dtype, at + k * p.out.d, p.out.d, load(out + i * size + k) * inverse,
                (int)at_most(p.head_size - k, LANES));
      float largest_score = most[i] * __builtin_fabsf(p.scale);
      p.lse[head * p.queries + first + i] = largest_score + log(all(total[i]))[0];
    }
  }

  const char* run() {
    int64_t heads = p.samples * p.heads;
    packed_k = (uint32_t*)scratch(SCRATCH_INPUT, heads * (words_k + words_v) * 4);
    float* floats = (float*)scratch(SCRATCH_ROWS, p.threads * rows() * 4);
    if (!packed_k || !floats) return "no memory for the packed keys and values";
    packed_v = packed_k + heads * words_k;
    int64_t groups = (p.queries + QUERIES - 1) / QUERIES;
    auto body = [&](Team team) {
      Share mine = share(heads, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack_head(i);
      team.barrier();
      mine = share(heads * groups, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) attend(i / groups, i % groups * QUERIES, floats + team.rank * rows());
    };
    parallel(heads * p.queries * p.keys < 4096 ? 1 : p.threads, body);
    return nullptr;
  }
};

}  // namespace

const char* attention(const AttentionArguments& p) {
  if (p.samples <= 0 || p.heads <= 0 || p.queries <= 0 || p.keys <= 0 || p.head_size <= 0) return "a size is not positive";
  return p.dtype == BFLOAT16 ? Heads<true>(p).run() : Heads<false>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

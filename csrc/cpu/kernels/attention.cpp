// Attention without the matrix of scores: softmax(scale · q kᵀ) v, block of keys after block of keys, with the running
// maximum and sum of each query's row (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// The keys and values of each head are packed once into panels that the matrix products read from one end to the other.
// A thread then has 64 queries at a time: each panel that the first-level cache holds serves all of them. bfloat16 inputs are
// multiplied as they are and summed in float32, the weights p rounded to bfloat16 before they meet v; others are multiplied in
// float32, or rounded to bfloat16 first where that is asked for.
#include "../attention_by_tiles.h"
#include "../attention_heads.h"
#include "../attention_softmax.h"
#include "../faults.h"
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
struct Attention : Heads<PAIRS> {
  using Heads<PAIRS>::p, Heads<PAIRS>::size, Heads<PAIRS>::keys, Heads<PAIRS>::packed_k, Heads<PAIRS>::packed_v;
  using Heads<PAIRS>::words_k, Heads<PAIRS>::words_v, Heads<PAIRS>::WORD, Heads<PAIRS>::ROWS;
  using Heads<PAIRS>::WHOLE, Heads<PAIRS>::LONGEST_SUM;
  using State = Softmax<PAIRS>;
  static constexpr int64_t QUERIES = State::QUERIES, KEYS = State::KEYS, SCORES = State::SCORES;

  explicit Attention(const AttentionArguments& p) : Heads<PAIRS>(p) {}

  // The keys of a head, or its values.
  void pack_head(int64_t head, bool keys_of_it) const {
    int64_t n = head / p.heads, h = head % p.heads;
    if (keys_of_it)
      this->pack(packed_k + head * words_k, p.k.data, n * p.k.n + h * p.k.h, p.k.d, p.k.t, p.head_size, p.keys, size);
    else this->pack(packed_v + head * words_v, p.v.data, n * p.v.n + h * p.v.h, p.v.t, p.v.d, p.keys, p.head_size, keys);
  }

  // A group of queries as the left operand, those beyond the last 0.
  void pack_queries(float* to, int64_t at, int64_t count) const {
    if (PAIRS && p.dtype == BFLOAT16 && p.q.d == 1 && p.head_size % (2 * LANES) == 0 && LANES == BLOCK) {
      const Words sign = (Words{} + 0x80008000u) * (p.scale < 0 ? 1 : 0);
      for (int64_t k = 0; k < size; k += 2 * LANES)
        for (int64_t m = 0; m < ROWS; ++m)
          *(WordsThere*)((uint16_t*)to + (k / 32 * ROWS + m) * 32) =
              m < count ? *(const WordsThere*)((const uint16_t*)p.q.data + at + m * p.q.t + k) ^ sign : Words{};
      return;
    }
    float sign = p.scale < 0 ? -1.0f : 1.0f;
    for (int64_t k = 0; k < size; k += LANES)
      for (int64_t m = 0; m < ROWS; ++m) {
        int64_t lanes = m < count ? at_most(p.head_size - k, LANES) : 0;
        Floats x = lanes > 0 ? sign * gather(p.q.data, p.dtype, at + m * p.q.t + k * p.q.d, p.q.d, (int)lanes) : zeros();
        put_row<PAIRS>(to, k, m, x);
      }
  }

  float factor() const { return __builtin_fabsf(p.scale) * 1.44269504f; }  // of scores, in powers of 2

  // Queries of a head that are worked on together, and what is known of them.
  struct Piece {
    int64_t head, first, count;
    float *q, *out;  // the left operand; [count][size], not yet divided by the sums of weights
    State softmax;
  };

  void begin(Piece& piece, int64_t head, int64_t first, int64_t most) const {
    int64_t n = head / p.heads, h = head % p.heads;
    piece.head = head, piece.first = first, piece.count = at_most(p.queries - first, most);
    if (FAULT(last_queries_missed) && piece.count % ROWS) --piece.count;
    piece.softmax.begin();
    for (int64_t i = 0; i < piece.count; i += ROWS)
      pack_queries(piece.q + i * size, n * p.q.n + h * p.q.h + (first + i) * p.q.t, piece.count - i);
  }

  void finish(const Piece& piece) const {
    const State& known = piece.softmax;
    int64_t n = piece.head / p.heads, h = piece.head % p.heads;
    for (int64_t i = 0; i < piece.count; i += LANES) {
      Words rows[LANES];
      for (int j = 0; j < LANES; ++j) rows[j] = bits(known.totals[i + j]);
      const Floats total = State::across(rows, [](Floats x, Floats y) { return x + y; });
      alignas(64) float inverse[LANES], lse[LANES];
      store(inverse, 1.0f / total);
      store(lse, load(known.most + i) * __builtin_fabsf(p.scale) + log(total));
      for (int64_t j = 0; j < at_most(piece.count - i, LANES); ++j) {
        int64_t t = piece.first + i + j, at = n * p.out.n + h * p.out.h + t * p.out.t;
        if (p.dtype == BFLOAT16 && p.out.d == 1 && p.head_size % LANES == 0)
          for (int64_t k = 0; k < p.head_size; k += LANES)
            store_bfloat16((uint16_t*)p.out.data + at + k, load(piece.out + (i + j) * size + k) * inverse[j]);
        else for (int64_t k = 0; k < p.head_size; k += LANES)
          scatter((void*)p.out.data, p.dtype, at + k * p.out.d, p.out.d, load(piece.out + (i + j) * size + k) * inverse[j],
                  (int)at_most(p.head_size - k, LANES));
        p.lse[piece.head * p.queries + t] = lse[j];
      }
    }
  }

  void attend(Piece& piece, float* scores) const {
    const int64_t count = piece.count;
    for (int64_t from = 0; from < p.keys; from += KEYS) {
      int64_t here = at_most(p.keys - from, KEYS), padded = round_up(here, WHOLE);
      // What is read of keys and values stays in the first cache while it meets all queries.
      for (int64_t j = 0, width; j < padded; j += width) {
        width = this->panel(padded - j);
        for (int64_t i = 0; i < count; i += ROWS)
          multiply_panel<PAIRS>((const uint32_t*)(piece.q + i * size), packed_k + piece.head * words_k + (from + j) * size / WORD,
                                (int)width, (p.head_size + WORD - 1) / WORD,
                                {scores + i * SCORES + State::score(0, j), BLOCK, ROWS * BLOCK, false}, {nullptr, 0});
      }
      piece.softmax.block(scores, count, here, factor());
      if (from > 0) piece.softmax.rescale(piece.out, count, p.head_size, size);
      const uint32_t* v = packed_v + piece.head * words_v;
      for (int64_t j = 0, width; j < size; j += width) {
        width = this->panel(size - j);
        int64_t columns = round_up(p.head_size - j, LANES);
        for (int64_t k = 0, words; k < padded / WORD; k += words) {
          words = at_most(padded / WORD - k, LONGEST_SUM);
          for (int64_t i = 0; i < count; i += ROWS)
            multiply_panel<PAIRS>((const uint32_t*)(scores + i * SCORES) + k * ROWS, v + (from / WORD + k) * width,
                                  (int)width, words, {piece.out + i * size + j, size, BLOCK, from + k > 0}, {nullptr, 0},
                                  ROWS, (int)columns);
        }
        v += keys * width / WORD;
      }
    }
    finish(piece);
  }

  // Floats that a thread needs: the queries, the sums and the scores.
  int64_t floats() const { return QUERIES * (2 * size + SCORES); }

  // Pieces [begin, end), `groups` of each head and of `most` queries.
  void attend_all(Share mine, int64_t groups, int64_t most, float* memory) const {
    Piece piece;
    piece.q = memory, piece.out = memory + QUERIES * size;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      begin(piece, i / groups, i % groups * most, most);
      attend(piece, memory + 2 * QUERIES * size);
    }
  }

  const char* run() {
    int64_t heads = p.samples * p.heads;
    packed_k = (uint32_t*)scratch(SCRATCH_INPUT, heads * (words_k + words_v) * 4);
    float* memory = (float*)scratch(SCRATCH_ROWS, p.threads * floats() * 4);
    if (!packed_k || !memory) return "no memory for the packed keys and values";
    packed_v = packed_k + heads * words_k;
    bool small = heads * p.queries * p.keys * size < (3 << 16);  // a second thread would come when all is done
    int threads = small ? 1 : p.threads;
    int64_t most = QUERIES;  // of a piece's queries, so that threads have the same number of them
    while (most > 2 * ROWS && heads * ceil_divide(p.queries, most) % threads) most /= 2;
    int64_t groups = ceil_divide(p.queries, most);
    auto body = [&](Team team) {
      Share mine = share(2 * heads, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack_head(i / 2, i % 2 == 0);
      team.barrier();
      attend_all(share(heads * groups, team), groups, most, memory + team.rank * floats());
    };
    parallel(threads, body);
    return nullptr;
  }
};

}  // namespace

const char* attention(const AttentionArguments& p) {
  if (p.samples <= 0 || p.heads <= 0 || p.queries <= 0 || p.keys <= 0 || p.head_size <= 0) return "a size is not positive";
  if (!p.pairs && p.dtype != BFLOAT16) return Attention<false>(p).run();
  if constexpr (TILES) return attention_by_tiles(p);
  else return Attention<true>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

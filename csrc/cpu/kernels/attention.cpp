// Attention without the matrix of scores: softmax(scale · q kᵀ) v, block of keys after block of keys, with the running
// maximum and sum of each query's row (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// The keys and values of each head are packed once into panels that the matrix products read from one end to the other.
// A thread then has 64 queries at a time: each panel that the first-level cache holds serves all of them. With tiles it has
// 32: while the scores of a block of keys become weights, the block before meets its values, and the queries meet the keys of
// the block after, of this piece of queries or the next. bfloat16 inputs are multiplied as they are and summed in float32,
// the weights p rounded to bfloat16 before they meet v; others are multiplied in float32, or rounded to bfloat16 first where
// that is asked for.
#include "../attention_heads.h"
#include "../attention_softmax.h"
#include "../faults.h"
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../scratch.h"
#include "../team.h"
#include "../tile_products.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

template <bool PAIRS>
struct Attention : Heads<PAIRS> {
  using Heads<PAIRS>::p, Heads<PAIRS>::size, Heads<PAIRS>::keys, Heads<PAIRS>::packed_k, Heads<PAIRS>::packed_v;
  using Heads<PAIRS>::words_k, Heads<PAIRS>::words_v, Heads<PAIRS>::WORD, Heads<PAIRS>::ROWS, Heads<PAIRS>::PANEL;
  using Heads<PAIRS>::WHOLE, Heads<PAIRS>::LONGEST_SUM;
  using State = Softmax<PAIRS>;
  static constexpr int64_t QUERIES = State::QUERIES, KEYS = State::KEYS, SCORES = State::SCORES, WEIGHTS = State::WEIGHTS;
  static constexpr bool TILED = State::TILED;

  explicit Attention(const AttentionArguments& p) : Heads<PAIRS>(p) {}

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
      this->pack_queries(piece.q + i * size, n * p.q.n + h * p.q.h + (first + i) * p.q.t, piece.count - i);
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

  // ---- the products of one block of keys after those of the other

  void attend(Piece& piece, float* scores) const {
    const int64_t count = piece.count;
    for (int64_t from = 0; from < p.keys; from += KEYS) {
      int64_t here = at_most(p.keys - from, KEYS), padded = round_up(here, WHOLE);
      // What is read of keys and values stays in the first cache while it meets all queries.
      for (int64_t j = 0; j < padded; j += PANEL)
        for (int64_t i = 0; i < count; i += ROWS)
          multiply_panel<PAIRS>((const uint32_t*)(piece.q + i * size), packed_k + piece.head * words_k + (from + j) * size / WORD,
                                (int)at_most(padded - j, PANEL), (p.head_size + WORD - 1) / WORD,
                                {scores + i * SCORES + State::score(0, j), BLOCK, ROWS * BLOCK, false}, {nullptr, 0});
      piece.softmax.block(scores, scores, count, here, factor(), [] {});
      if (from > 0) piece.softmax.rescale(piece.out, count, p.head_size, size);
      const uint32_t* v = packed_v + piece.head * words_v;
      for (int64_t j = 0; j < size; j += PANEL) {
        int64_t width = at_most(size - j, PANEL), columns = round_up(p.head_size - j, LANES);
        for (int64_t k = 0, words; k < padded / WORD; k += words) {
          words = at_most(padded / WORD - k, LONGEST_SUM);
          for (int64_t i = 0; i < count; i += ROWS)
            multiply_panel<PAIRS>((const uint32_t*)(scores + i * WEIGHTS) + k * ROWS, v + (from / WORD + k) * width,
                                  (int)width, words, {piece.out + i * size + j, size, BLOCK, from + k > 0}, {nullptr, 0},
                                  ROWS, (int)columns);
        }
        v += keys * width / WORD;
      }
    }
    finish(piece);
  }

  // Floats that a thread needs: of pieces the queries and the sums, the scores, and for tiles the weights.
  static constexpr int64_t PIECES = TILED ? 3 : 1;
  int64_t floats() const {
    return QUERIES * (PIECES * 2 * size + (TILED ? 2 * (SCORES + WEIGHTS) : SCORES));
  }

  // Pieces [begin, end), `groups` of each head and of `most` queries.
  void attend_all(Share mine, int64_t groups, int64_t most, float* memory) const {
    Piece pieces[PIECES];
    for (Piece& piece : pieces) piece.q = memory, piece.out = memory + QUERIES * size, memory += 2 * QUERIES * size;
    auto begin_piece = [&](int64_t i) { begin(pieces[i % PIECES], i / groups, i % groups * most, most); };
    if constexpr (!TILED) {
      for (int64_t i = mine.begin; i < mine.end; ++i) begin_piece(i), attend(pieces[i % PIECES], memory);
    } else attend_by_tiles(mine, pieces, begin_piece, memory);
  }

#if defined(CMFAST_TILES)

  // ---- the products by tiles: while a block's scores become weights, the weights of the block before meet their values,
  // and the queries those keys that come next

  TileProducts scores_of(const Piece& piece, int64_t block, float* scores) const {
    const int64_t from = block * KEYS;
    const uint32_t* k = packed_k + piece.head * words_k + from * size / WORD;
    return {(const uint32_t*)piece.q, k, size / WORD, at_most(p.keys - from, KEYS), PANEL * size / WORD, scores, SCORES, false};
  }

  TileProducts values_of(const Piece& piece, int64_t block, const float* weights) const {
    const int64_t from = block * KEYS, count = round_up(at_most(p.keys - from, KEYS), WHOLE);
    const uint32_t* v = packed_v + piece.head * words_v + from / WORD * PANEL;
    return {(const uint32_t*)weights, v, count / WORD, p.head_size, PANEL * keys / WORD, piece.out, size, block > 0};
  }

  template <class BeginPiece>
  void attend_by_tiles(Share mine, Piece (&pieces)[PIECES], BeginPiece begin_piece, float* memory) const {
    if (mine.begin == mine.end) return;
    float* const scores[2] = {memory, memory + QUERIES * SCORES};
    float* const weights[2] = {scores[1] + QUERIES * SCORES, scores[1] + QUERIES * (SCORES + WEIGHTS)};
    const int64_t blocks = ceil_divide(p.keys, KEYS);
    begin_piece(mine.begin);
    TileProducts before{}, after = scores_of(pieces[mine.begin % PIECES], 0, scores[0]);
    after.some(after.steps());
    for (int64_t i = mine.begin, turn = 0; i < mine.end; ++i) {
      Piece& piece = pieces[i % PIECES];
      for (int64_t block = 0; block < blocks; ++block, ++turn) {
        const bool last = block + 1 == blocks;
        if (last && i + 1 < mine.end) begin_piece(i + 1);
        after = last && i + 1 == mine.end
                    ? TileProducts{}
                    : scores_of(pieces[(i + last) % PIECES], last ? 0 : block + 1, scores[(turn + 1) % 2]);
        TileProductsMeanwhile products{before, after, piece.count};
        piece.softmax.block(scores[turn % 2], weights[turn % 2], piece.count, at_most(p.keys - block * KEYS, KEYS),
                            factor(), products);
        products.rest();
        if (block > 0) piece.softmax.rescale(piece.out, piece.count, p.head_size, size);
        else if (i > mine.begin) finish(pieces[(i - 1) % PIECES]);
        before = values_of(piece, block, weights[turn % 2]);
      }
    }
    before.some(before.steps());
    finish(pieces[(mine.end - 1) % PIECES]);
  }

#endif

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
      TileUse tiles;
      Share mine = share(2 * heads, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) this->pack_head(i / 2, i % 2 == 0);
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
  return p.pairs || p.dtype == BFLOAT16 ? Attention<true>(p).run() : Attention<false>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

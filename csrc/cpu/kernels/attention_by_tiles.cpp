// Attention in bfloat16 by a processor's tiles: softmax(scale · q kᵀ) v, block of keys after block of keys, with the running
// maximum and sum of each query (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// Everything is transposed: a row of scores is a key's, with 32 queries, so that the largest score of a query, its sum and its
// weights stay in its lane. The keys, and the values by channels, are packed once, as left operands. A thread has 32 queries
// at a time, whose scores stay in the first cache.
//
// Products and weights take turns. The tiles share a unit with the 512-bit multiplications: done at the same time, both take
// longer than one after the other (Intel Xeon with AMX: 44 ns of products beside 68 of multiplications take 147).
#include "../attention_by_tiles.h"

#include "../attention_heads.h"
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

struct AttentionByTiles : Heads<true> {
  static constexpr int64_t QUERIES = 2 * TILE, VECTORS = QUERIES / LANES;  // of a row of scores
  static constexpr int64_t KEYS = 128;        // of a block, whose scores are 16 KB
  static constexpr int64_t FEW = 4;           // keys that are looked at together: each register waits for itself alone
  static constexpr int64_t GROUP = 2 * TILE;  // rows of a left operand
  // By so many powers of 2 a query's scores may exceed the one that they are compared with, before what was summed is
  // rescaled: weights and their sums stay far from float32's largest number.
  static constexpr float GROWTH = 8;

  const int64_t channels = round_up(p.head_size, GROUP);
  const float factor = __builtin_fabsf(p.scale) * 1.44269504f;  // of scores, in powers of 2

  explicit AttentionByTiles(const AttentionArguments& p) : Heads<true>(p) { words_v = channels * keys / WORD; }

  // 32 queries of a head, and what is known of them.
  struct Piece {
    int64_t head, first, count;
    uint32_t* q;    // the right operand
    float* out;     // [channels][32], not yet divided by the sums of weights
    float* scores;  // of a block of keys, [KEYS][32]
    // Lane by lane: what scores are compared with, the sum of weights, and by how much the last block of keys has changed
    // what was summed before.
    Floats most[VECTORS], totals[VECTORS], changes[VECTORS];
    bool changed;
  };

  void begin(Piece& piece, int64_t head, int64_t first) const {
    const int64_t n = head / p.heads, h = head % p.heads;
    piece.head = head, piece.first = first, piece.count = at_most(p.queries - first, QUERIES);
    if (FAULT(last_queries_missed) && piece.count % QUERIES) --piece.count;
    for (int64_t i = 0; i < VECTORS; ++i) piece.most[i] = all(-__builtin_inff()), piece.totals[i] = zeros();
    pack(piece.q, p.q.data, n * p.q.n + h * p.q.h + first * p.q.t, p.q.d, p.q.t, p.head_size, piece.count, size);
    if (p.scale < 0)
      for (int64_t i = 0; i < size / WORD * QUERIES; ++i) piece.q[i] ^= 0x80008000u;
  }

  // The matrix whose element (m, k) is data[at + m·down + k·across] as a left operand: groups of 32 rows.
  void pack_left(uint32_t* to, const void* data, int64_t at, int64_t down, int64_t across, int64_t rows, int64_t columns,
                 int64_t padded_columns) const {
    const int64_t words = padded_columns / WORD;
    alignas(64) uint16_t line[2 * LANES];
    for (int64_t m = 0; m < round_up(rows, GROUP); m += LANES, at += LANES * down)
      for (int64_t w = 0; w < words; w += LANES) {
        Words square[LANES];
        CMFAST_UNROLL
        for (int64_t i = 0; i < LANES; ++i)
          square[i] = across != 1 ? row_of_words(data, at, across, down, (w + i) * WORD, columns, rows - m)
                                  : column_of_words(data, at + i * down, w * WORD, m + i < rows ? columns : 0, line);
        if (across != 1) transpose(square);
        uint32_t* there = to + m / GROUP * GROUP * words + w / TILE * GROUP * TILE + m % GROUP * TILE + w % TILE;
        CMFAST_UNROLL
        for (int64_t i = 0; i < LANES; ++i) *(WordsThere*)(there + i * TILE) = square[i];
      }
  }

  // The keys of a head as a left operand, or its values, a row a channel.
  void pack_head(int64_t head, bool keys_of_it) const {
    const int64_t n = head / p.heads, h = head % p.heads;
    uint32_t *k = packed_k + head * words_k, *v = packed_v + head * words_v;
    if (keys_of_it) pack_left(k, p.k.data, n * p.k.n + h * p.k.h, p.k.t, p.k.d, p.keys, p.head_size, size);
    else pack_left(v, p.v.data, n * p.v.n + h * p.v.h, p.v.d, p.v.t, p.head_size, p.keys, keys);
  }

  // ---- a block of scores

  // Weights of two keys as pairs of bfloat16, to nearest. What is NaN stays it: it comes from bfloat16, and has no low bits.
  static CMFAST_INLINE Words to_pair(Floats first, Floats second) {
    return (bits(first) + 0x8000u) >> 16 | ((bits(second) + 0x8000u) & 0xFFFF0000u);
  }

  // The rows of `count` keys, [keys][32], become weights in the order of a right operand, which begin where the scores do.
  void weigh(Piece& piece, int64_t count) const {
    compare(piece, count);
    const float* const scores = piece.scores;
    Floats shift[VECTORS], totals[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) {
      // Weights of 0, not of NaN, where all scores so far are −inf.
      shift[v] = piece.most[v] == -__builtin_inff() ? zeros() : piece.most[v] * factor;
      totals[v] = FAULT(sum_not_rescaled) ? piece.totals[v] : piece.totals[v] * piece.changes[v];
    }
    const int64_t padded = round_up(count, 2 * BLOCK);
    uint32_t* to = (uint32_t*)piece.scores;
    for (int64_t i = 0; i < padded; i += FEW) {
      constexpr int N = FEW * VECTORS;
      Floats x[N];
      CMFAST_UNROLL
      for (int64_t j = 0; j < N; ++j) x[j] = load(scores + i * QUERIES + j * LANES) * factor - shift[j % VECTORS];
      exp2_to_bfloat16(x);
      if (i + FEW > count && !FAULT(tail_of_keys_attended))
        for (int64_t j = 0; j < N; ++j) x[j] = i + j / VECTORS < count ? x[j] : zeros();
      CMFAST_UNROLL
      for (int64_t j = 0; j < N; ++j) totals[j % VECTORS] += x[j];
      CMFAST_UNROLL
      for (int64_t j = 0; j < N; j += 2 * VECTORS)
        CMFAST_UNROLL
        for (int64_t v = 0; v < VECTORS; ++v, to += LANES) *(WordsThere*)to = to_pair(x[j + v], x[j + VECTORS + v]);
    }
    for (int64_t v = 0; v < VECTORS; ++v) piece.totals[v] = totals[v];
  }

  // What the weights of a block are relative to: the largest score of the first; later that of the block where it is much
  // larger than the one before.
  void compare(Piece& piece, int64_t count) const {
    const float* const scores = piece.scores;
    Floats top[FEW][VECTORS];
    for (auto& row : top)
      for (Floats& x : row) x = all(-__builtin_inff());
    int64_t i = 0;
    for (; i + FEW <= count; i += FEW)
      CMFAST_UNROLL
      for (int64_t j = 0; j < FEW * VECTORS; ++j)
        top[j / VECTORS][j % VECTORS] = max(top[j / VECTORS][j % VECTORS], load(scores + i * QUERIES + j * LANES));
    for (; i < count; ++i)
      for (int64_t v = 0; v < VECTORS; ++v) top[0][v] = max(top[0][v], load(scores + i * QUERIES + v * LANES));
    piece.changed = false;
    for (int64_t v = 0; v < VECTORS; ++v) {
      const Floats next = max(max(top[0][v], top[1][v]), max(top[2][v], top[3][v])), before = piece.most[v];
      const Ints first = (before == -__builtin_inff()) & (next > before);  // whatever the factor, which may be 0
      const Ints grown = first | ((next - before) * factor > GROWTH);
      const Floats change = before == -__builtin_inff() ? zeros() : exp2((before - next) * factor);
      piece.changes[v] = grown ? change : all(1.0f);
      piece.most[v] = grown ? next : before;
      piece.changed |= sum(grown ? all(1.0f) : zeros()) != 0;
    }
  }

  // What was summed of the values before the last block of keys, as the block has changed it.
  void rescale(const Piece& piece) const {
    if (!piece.changed || FAULT(values_not_rescaled)) return;
    for (int64_t i = 0; i < round_up(p.head_size, TILE) * VECTORS; ++i)
      store(piece.out + i * LANES, load(piece.out + i * LANES) * piece.changes[i % VECTORS]);
  }

  void finish(const Piece& piece) const {
    const int64_t n = piece.head / p.heads, h = piece.head % p.heads, at = n * p.out.n + h * p.out.h;
    for (int64_t v = 0; v < VECTORS && v * LANES < piece.count; ++v) {
      const int64_t first = piece.first + v * LANES, here = at_most(piece.count - v * LANES, LANES);
      const Floats total = piece.totals[v], inverse = 1.0f / total;
      const bool bfloat16 = p.dtype == BFLOAT16 && p.out.d == 1;
      store(p.lse + piece.head * p.queries + first, piece.most[v] * __builtin_fabsf(p.scale) + log(total), (int)here);
      for (int64_t k = 0; k < p.head_size; k += LANES) {
        Words square[LANES];
        CMFAST_UNROLL
        for (int64_t i = 0; i < LANES; ++i)
          square[i] = bits(load(piece.out + (k + i) * QUERIES + v * LANES) * inverse);
        transpose(square);
        const int64_t width = at_most(p.head_size - k, LANES);
        for (int64_t i = 0; i < here; ++i) {
          const int64_t there = at + (first + i) * p.out.t + k * p.out.d;
          if (bfloat16 && width == LANES) store_bfloat16((uint16_t*)p.out.data + there, as_floats(square[i]));
          else scatter((void*)p.out.data, p.dtype, there, p.out.d, as_floats(square[i]), (int)width);
        }
      }
    }
  }

  // ---- products, and all of a piece

  // C[rows][32] = A · B, or added to it: 32 rows at most, of which 16 are multiplied where they are all.
  static void multiply(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t words, float* c, bool accumulate) {
    const Product to{c, QUERIES, TILE, accumulate};
    if (rows > TILE) multiply_by_tiles<2, 2>(a, b, QUERIES, words, to, {nullptr, 0});
    else multiply_by_tiles<1, 2>(a, b, QUERIES, words, to, {nullptr, 0});
  }

  void attend(Piece& piece) const {
    const uint32_t *k = packed_k + piece.head * words_k, *v = packed_v + piece.head * words_v;
    for (int64_t from = 0; from < p.keys; from += KEYS) {
      const int64_t count = at_most(p.keys - from, KEYS), words = round_up(count, WHOLE) / WORD;
      for (int64_t row = 0; row < count; row += GROUP)
        multiply(k + (from + row) * size / WORD, count - row, piece.q, size / WORD, piece.scores + row * QUERIES, false);
      weigh(piece, count);
      if (from > 0) rescale(piece);
      for (int64_t row = 0; row < p.head_size; row += GROUP)
        multiply(v + (from * GROUP + row * keys) / WORD, p.head_size - row, (const uint32_t*)piece.scores, words,
                 piece.out + row * QUERIES, from > 0);
    }
    finish(piece);
  }

  // Floats that a thread needs: the queries, the sums and the scores.
  int64_t floats() const { return QUERIES * (size / WORD + channels + KEYS); }

  const char* run() {
    const int64_t heads = p.samples * p.heads, groups = ceil_divide(p.queries, QUERIES);
    packed_k = (uint32_t*)scratch(SCRATCH_INPUT, heads * (words_k + words_v) * 4);
    float* memory = (float*)scratch(SCRATCH_ROWS, p.threads * floats() * 4);
    if (!packed_k || !memory) return "no memory for the packed keys and values";
    packed_v = packed_k + heads * words_k;
    const bool small = heads * p.queries * p.keys * size < (3 << 16);  // a second thread would come when all is done
    auto body = [&](Team team) {
      TileUse tiles;
      Share mine = share(2 * heads, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack_head(i / 2, i % 2 == 0);
      team.barrier();
      mine = share(heads * groups, team);
      Piece piece;
      piece.scores = memory + team.rank * floats();
      piece.out = piece.scores + QUERIES * KEYS, piece.q = (uint32_t*)(piece.out + QUERIES * channels);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        begin(piece, i / groups, i % groups * QUERIES);
        attend(piece);
      }
    };
    parallel(small ? 1 : p.threads, body);
    return nullptr;
  }
};

}  // namespace

const char* attention_by_tiles(const AttentionArguments& p) { return AttentionByTiles(p).run(); }

}  // namespace CMFAST_ISA
}  // namespace cmfast

// The gradient of attention, from the log-sum-exp that the forward saved, without the matrix of scores:
//
//     p = exp(scale · q kᵀ − lse)    δ = Σ_d dO · O    dS = p · (dO vᵀ − δ)
//     dq = scale · dS k              dk = scale · dSᵀ q            dv = pᵀ dO
//
// (Dao et al. 2022, appendix B.2). A piece of work is a head, or where heads are few a part of its keys: block of keys
// after block of keys meets block of queries after block of queries. pᵀ and dSᵀ of both blocks are computed with a key a
// row, so that a lane is a query, and are then the left operands of dv and dk; dSᵀ is written a second time, as the
// right operand of dqᵀ = kᵀ dSᵀ. dk and dv of a block of keys are complete when all queries have been met. dq is summed
// over the blocks of keys, and over a head's parts in their order: their number depends on the shape alone, so that two
// runs agree to the bit whatever the number of threads.
//
// All products are of float32. The exponent is scaled by log2 e only after the subtraction: lse is rounded at its own
// size, and to round it once more, scaled, would double the error of every p.
#include "../functions.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../scratch.h"
#include "../squares.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int ROWS = Sizes<false>::ROWS, PANEL = Sizes<false>::PANEL;
constexpr int64_t QUERIES = 2 * PANEL, KEYS = 96;  // of a block: whole panels, and whole groups of rows
constexpr int64_t PIECES = 16;  // of work at least, so that threads have the same number of them
constexpr int64_t SMALL = 3 << 13;  // products that one thread takes sooner than two

// Rows of an operand from some element on: row i, i < LANES, is at first + i % 8 · next + i / 8 · group.
struct Lines {
  float* first;
  int64_t next, group;
  CMFAST_INLINE float* operator[](int i) const { return first + (i % ROWS * next + i / ROWS * group); }
};

// A matrix that is the left operand of a product, or its result: groups of eight rows, of so many columns, whole blocks
// of 16.
struct LeftOperand {
  float* data;
  int64_t columns;
  CMFAST_INLINE Lines lines(int64_t r, int64_t c) const {
    float* first = data + r / ROWS * (ROWS * columns) + c / BLOCK * (ROWS * BLOCK) + r % ROWS * BLOCK + c % BLOCK;
    return {first, BLOCK, ROWS * columns};
  }
};

// One that is the right operand: panels of 48 columns, the last of what is left, of so many rows.
struct RightOperand {
  float* data;
  int64_t rows, columns;
  CMFAST_INLINE Lines lines(int64_t r, int64_t c) const {
    int64_t first = c / PANEL * PANEL, width = at_most(columns - first, PANEL);
    return {data + (first * rows + r * width + (c - first)), width, ROWS * width};
  }
};

struct Heads {
  const AttentionBackwardArguments& p;
  int64_t size, queries;      // the head size and the queries, whole blocks of 16
  int64_t parts, keys;        // of a head: its parts, and the keys of a part

  Heads(const AttentionBackwardArguments& p)
      : p(p), size(round_up(p.head_size, BLOCK)), queries(round_up(p.queries, BLOCK)) {
    int64_t heads = p.samples * p.heads, blocks = (p.keys + KEYS - 1) / KEYS;
    parts = at_most((PIECES + heads - 1) / heads, blocks);
    keys = (blocks + parts - 1) / parts * KEYS;
    parts = (p.keys + keys - 1) / keys;
  }

  // Floats of dqᵀ of a part, and those that a thread needs beside it.
  int64_t sums() const { return size * queries; }
  int64_t floats() const { return (4 * size + 2) * queries + 5 * KEYS * size + 3 * KEYS * QUERIES; }

  // An operand and its transpose, where there is data for them: whole blocks, 0 beyond the last row and column.
  template <class Operand>
  void pack(const Operand& to, const Operand& transposed, const Matrix& from, int64_t rows, int64_t columns) const {
    bool turned = from.by_columns();
    for (int64_t r = 0; r < round_up(rows, BLOCK); r += LANES)
      for (int64_t c = 0; c < round_up(columns, BLOCK); c += LANES) {
        Words square[LANES];
        load_square(from, r, c, rows - r, columns - c, square);
        for (int time = 0; time < 2; ++time) {
          bool straight = turned == (time == 1);
          if (!(straight ? to : transposed).data) continue;
          if (time) transpose(square);
          Lines lines = straight ? to.lines(r, c) : transposed.lines(c, r);
          CMFAST_UNROLL
          for (int i = 0; i < LANES; ++i) *(WordsThere*)lines[i] = square[i];
        }
      }
  }

  // Rows `begin` to `end` of a result, `factor` times the sum of so many matrices `apart` floats apart.
  void write(const Matrix& to, int64_t begin, int64_t end, int64_t columns, float* from, int64_t matrices,
             int64_t apart, float factor) const {
    LeftOperand result{from, round_up(columns, BLOCK)};
    bool turned = to.by_columns();
    for (int64_t r = begin; r < end; r += LANES)
      for (int64_t c = 0; c < columns; c += LANES) {
        Words square[LANES];
        Lines lines = result.lines(r, c);
        CMFAST_UNROLL
        for (int i = 0; i < LANES; ++i) square[i] = bits(load(lines[i]) * factor);
        for (int64_t m = 1; m < matrices && !FAULT(first_part_only); ++m)
          for (int i = 0; i < LANES; ++i)
            square[i] = bits(as_floats(square[i]) + load(lines[i] + m * apart) * factor);
        if (turned) transpose(square);
        store_square(to, r, c, end - r, columns - c, square);
      }
  }

  // Of rows `begin` to `end` of dqᵀ.
  void write_queries(int64_t head, int64_t begin, int64_t end, float* dq) const {
    write(matrix(p.dq, head, 0, true), begin, end, p.queries, dq, parts, sums(), p.scale);
  }

  // A head of a tensor from position t on, or its transpose.
  Matrix matrix(const AttentionTensor& x, int64_t head, int64_t t, bool transposed = false) const {
    int64_t at = head / p.heads * x.n + head % p.heads * x.h + t * x.t;
    return {(void*)x.data, p.dtype, at, transposed ? x.d : x.t, transposed ? x.t : x.d};
  }

  // lse and δ of every query, 0 beyond the last.
  void rows_of_queries(int64_t head, float* lse, float* delta) const {
    int64_t n = head / p.heads, h = head % p.heads;
    int64_t grad = n * p.grad.n + h * p.grad.h, out = n * p.out.n + h * p.out.h;
    for (int64_t t = 0; t < queries; t += LANES) {
      int lanes = (int)at_most(p.queries - t, LANES);
      store(lse + t, lanes > 0 ? load(p.lse + head * p.queries + t, lanes) : zeros());
      store(delta + t, zeros());
      if (p.out.d == 1) continue;
      Floats total = zeros();
      for (int64_t d = 0; d < p.head_size && lanes > 0; ++d)
        total += gather(p.grad.data, p.dtype, grad + t * p.grad.t + d * p.grad.d, p.grad.t, lanes) *
                 gather(p.out.data, p.dtype, out + t * p.out.t + d * p.out.d, p.out.t, lanes);
      store(delta + t, total);
    }
    for (int64_t t = 0; t < p.queries && p.out.d == 1; ++t) {
      Floats total = zeros();
      for (int64_t d = 0; d < p.head_size; d += LANES) {
        int lanes = (int)at_most(p.head_size - d, LANES);
        total += gather(p.grad.data, p.dtype, grad + t * p.grad.t + d * p.grad.d, p.grad.d, lanes) *
                 load(p.out.data, p.dtype, out + t * p.out.t + d, lanes);
      }
      delta[t] = sum(total);
    }
  }

  // Scores and gradients of the probabilities become probabilities and gradients of the scores, of eight keys or fewer.
  void softmax_gradient(float* scores, float* gradients, float* panels, int64_t key, int64_t rows, int64_t columns,
                        const float* lse, const float* delta) const {
    RightOperand right{panels, KEYS, round_up(columns, BLOCK)};
    for (int64_t j = 0; j < columns; j += LANES) {
      Floats minus_lse = -load(lse + j), minus_delta = FAULT(delta_missed) ? zeros() : -load(delta + j);
      int64_t at = j / BLOCK * (ROWS * BLOCK) + j % BLOCK;
      Lines lines = right.lines(key, j);
      for (int m = 0; m < rows; m += 4) {
        Floats probabilities[4];
        CMFAST_UNROLL
        for (int i = 0; i < 4; ++i)
          probabilities[i] = (load(scores + at + (m + i) * BLOCK) * p.scale + minus_lse) * 1.44269504f;
        exp2(probabilities);
        CMFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
          float* gradient = gradients + at + (m + i) * BLOCK;
          Floats dscore = probabilities[i] * (load(gradient) + minus_delta);
          store(scores + at + (m + i) * BLOCK, probabilities[i]);
          store(gradient, dscore);
          store(lines.first + (m + i) * lines.next, dscore);
        }
      }
    }
  }

  // So many rows of a left operand by columns `begin` to `end` of a right one, from its row `first` on.
  static void multiply(const LeftOperand& left, int64_t rows, const RightOperand& right, int64_t first, int64_t begin,
                       int64_t end, int64_t sum_of, const LeftOperand& to, bool accumulate) {
    for (int64_t j = begin; j < end; j += PANEL) {
      int width = (int)at_most(right.columns - j, PANEL);
      const float* panel = right.data + j * right.rows + first * width;
      for (int64_t r = 0; r < rows; r += ROWS)
        multiply_panel<false>((const uint32_t*)(left.data + r * left.columns), (const uint32_t*)panel, width, sum_of,
                              {to.data + r * to.columns + (j - begin) * ROWS, BLOCK, ROWS * BLOCK, accumulate},
                              {nullptr, 0}, (int)at_most(rows - r, ROWS), (int)round_up(at_most(end - j, PANEL), LANES));
    }
  }

  // dk and dv of a part's keys, and what they add to dqᵀ.
  void part(int64_t head, int64_t begin, float* memory, float* dq) const {
    int64_t d = p.head_size;
    auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
    RightOperand q_columns{take(sums()), size, queries}, grad_columns{take(sums()), size, queries};  // [D][T]
    RightOperand q_rows{take(sums()), queries, size}, grad_rows{take(sums()), queries, size};        // [T][D]
    LeftOperand k{take(KEYS * size), size}, v{take(KEYS * size), size}, k_columns{take(KEYS * size), KEYS};
    LeftOperand dk{take(KEYS * size), size}, dv{take(KEYS * size), size}, none{nullptr, 0};
    float *scores = take(KEYS * QUERIES), *gradients = take(KEYS * QUERIES), *panels = take(KEYS * QUERIES);
    float *lse = take(queries), *delta = take(queries);
    pack(q_rows, q_columns, matrix(p.q, head, 0), p.queries, d);
    pack(grad_rows, grad_columns, matrix(p.grad, head, 0), p.queries, d);
    rows_of_queries(head, lse, delta);
    for (int64_t s = begin, end = at_most(begin + keys, p.keys); s < end; s += KEYS) {
      int64_t count = at_most(end - s, KEYS);
      if (FAULT(last_keys_missed) && count % ROWS) --count;
      pack(k, k_columns, matrix(p.k, head, s), count, d);
      pack(v, none, matrix(p.v, head, s), count, d);
      for (int64_t t = 0; t < p.queries; t += QUERIES) {
        int64_t here = at_most(p.queries - t, QUERIES), columns = round_up(here, BLOCK);
        LeftOperand probabilities{scores, columns}, dscores{gradients, columns};
        multiply(k, count, q_columns, 0, t, t + here, d, probabilities, false);
        multiply(v, count, grad_columns, 0, t, t + here, d, dscores, false);
        for (int64_t r = 0; r < count; r += ROWS)
          softmax_gradient(scores + r * columns, gradients + r * columns, panels, r, at_most(count - r, ROWS), here,
                           lse + t, delta + t);
        multiply(probabilities, count, grad_rows, t, 0, d, here, dv, t > 0);
        multiply(dscores, count, q_rows, t, 0, d, here, dk, t > 0);
        multiply(k_columns, d, {panels, KEYS, columns}, 0, 0, here, count, {dq + t * ROWS, queries}, s > begin);
      }
      write(matrix(p.dk, head, s), 0, count, d, dk.data, 1, 0, p.scale);
      write(matrix(p.dv, head, s), 0, count, d, dv.data, 1, 0, 1.0f);
    }
  }

  const char* run() const {
    int64_t heads = p.samples * p.heads;
    int threads = heads * p.queries * p.keys * size < SMALL ? 1 : p.threads;
    int64_t totals = parts > 1 ? heads * parts : threads;  // of a part each, or of a thread
    float* memory = (float*)scratch(SCRATCH_ROWS, (threads * floats() + totals * sums()) * 4);
    if (!memory) return "no memory for the packed queries";
    float* dq = memory + threads * floats();
    auto body = [&](Team team) {
      float *own = memory + team.rank * floats();
      Share mine = share(heads * parts, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        float* to = dq + (parts > 1 ? i : team.rank) * sums();
        part(i / parts, i % parts * keys, own, to);
        if (parts == 1) write_queries(i, 0, p.head_size, to);
      }
      if (parts == 1) return;
      team.barrier();
      int64_t blocks = size / BLOCK;
      mine = share(heads * blocks, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        int64_t first = i % blocks * BLOCK;
        write_queries(i / blocks, first, at_most(first + BLOCK, p.head_size), dq + i / blocks * parts * sums());
      }
    };
    parallel(threads, body);
    return nullptr;
  }
};

}  // namespace

const char* attention_backward(const AttentionBackwardArguments& p) {
  if (p.samples <= 0 || p.heads <= 0 || p.queries <= 0 || p.keys <= 0 || p.head_size <= 0)
    return "a size is not positive";
  return Heads(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast

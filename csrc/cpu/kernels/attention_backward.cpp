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
#include "../isa.h"
#include "../matrix.h"
#include "../scratch.h"
#include "../squares.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t QUERIES = 2 * PANEL, KEYS = 96;  // of a block: whole panels, and whole groups of rows
constexpr int64_t PIECES = 16;  // of work at least, so that threads have the same number of them
constexpr int64_t SMALL = 3 << 13;  // products that one thread takes sooner than two

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// Where element (r, c) is of a matrix that is the left operand of a product, or its result: groups of eight rows, of
// so many columns, whole blocks of 16.
struct LeftOperand {
  int64_t columns;
  int64_t operator()(int64_t r, int64_t c) const {
    return r / ROWS * (ROWS * columns) + c / BLOCK * (ROWS * BLOCK) + r % ROWS * BLOCK + c % BLOCK;
  }
};

// Of one that is the right operand: panels of 48 columns, the last of what is left, of so many rows.
struct RightOperand {
  int64_t rows, columns;
  int64_t operator()(int64_t r, int64_t c) const {
    int64_t first = c / PANEL * PANEL;
    return first * rows + r * at_most(columns - first, PANEL) + c % PANEL;
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

  // An operand from `data`, whole blocks of it, 0 beyond the last row and column.
  template <class Operand>
  void pack(float* to, Operand place, const void* data, int64_t at, int64_t down, int64_t across, int64_t rows,
            int64_t columns) const {
    Words square[LANES];
    for (int64_t r = 0; r < round_up(rows, BLOCK); r += LANES)
      for (int64_t c = 0; c < round_up(columns, BLOCK); c += LANES) {
        load_square(data, p.dtype, at + r * down + c * across, down, across, rows - r, columns - c, square);
        for (int i = 0; i < LANES; ++i) *(WordsThere*)(to + place(r + i, c)) = square[i];
      }
  }

  // Rows `begin` to `end` of a result, `factor` times the sum of so many matrices `apart` floats apart.
  void write(const AttentionTensor& t, int64_t at, int64_t down, int64_t across, int64_t begin, int64_t end,
             int64_t columns, const float* from, int64_t matrices, int64_t apart, float factor) const {
    LeftOperand place{round_up(columns, BLOCK)};
    Words square[LANES];
    for (int64_t r = begin; r < end; r += LANES)
      for (int64_t c = 0; c < columns; c += LANES) {
        for (int i = 0; i < LANES; ++i) {
          const float* there = from + place(r + i, c);
          Floats sum = load(there);
          for (int64_t m = 1; m < matrices && !FAULT(first_part_only); ++m) sum += load(there + m * apart);
          square[i] = bits(sum * factor);
        }
        store_square((void*)t.data, p.dtype, at + r * down + c * across, down, across, end - r, columns - c, square);
      }
  }

  // Of rows `begin` to `end` of dqᵀ.
  void write_queries(int64_t head, int64_t begin, int64_t end, const float* dq) const {
    int64_t at = head / p.heads * p.dq.n + head % p.heads * p.dq.h;
    write(p.dq, at, p.dq.d, p.dq.t, begin, end, p.queries, dq, parts, sums(), p.scale);
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

  // Scores and gradients of the probabilities become probabilities and gradients of the scores, of eight keys.
  void softmax_gradient(float* scores, float* gradients, float* panels, int64_t key, int64_t columns,
                        const float* lse, const float* delta) const {
    RightOperand place{KEYS, columns};
    for (int64_t j = 0; j < columns; j += LANES) {
      Floats minus_lse = -load(lse + j), minus_delta = FAULT(delta_missed) ? zeros() : -load(delta + j);
      int64_t at = j / BLOCK * (ROWS * BLOCK) + j % BLOCK, to = place(key, j), next = place(key + 1, j) - to;
      for (int m = 0; m < ROWS; m += 4) {
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
          store(panels + to + (m + i) * next, dscore);
        }
      }
    }
  }

  // A left operand by panels from row `first` on, into such a result.
  static void multiply(const float* left, int64_t left_columns, int64_t rows, const float* right, int64_t right_rows,
                       int64_t first, int64_t right_columns, int64_t begin, int64_t end, int64_t sum_of, float* to,
                       int64_t to_columns, bool accumulate) {
    for (int64_t j = begin; j < end; j += PANEL) {
      int width = (int)at_most(right_columns - j, PANEL);
      const float* panel = right + j * right_rows + first * width;
      for (int64_t r = 0; r < rows; r += ROWS)
        multiply_panel<false>((const uint32_t*)(left + r * left_columns), (const uint32_t*)panel, width, sum_of,
                              {to + r * to_columns + (j - begin) * ROWS, BLOCK, ROWS * BLOCK, accumulate},
                              {nullptr, 0});
    }
  }

  // dk and dv of a part's keys, and what they add to dqᵀ.
  void part(int64_t head, int64_t begin, float* memory, float* dq) const {
    int64_t n = head / p.heads, h = head % p.heads, d = p.head_size;
    float *q_columns = memory, *grad_columns = q_columns + sums();     // [D][T]
    float *q_rows = grad_columns + sums(), *grad_rows = q_rows + sums();  // [T][D]
    float *lse = grad_rows + sums(), *delta = lse + queries;
    float *k = delta + queries, *v = k + KEYS * size, *k_columns = v + KEYS * size;
    float *dk = k_columns + KEYS * size, *dv = dk + KEYS * size;
    float *scores = dv + KEYS * size, *gradients = scores + KEYS * QUERIES, *panels = gradients + KEYS * QUERIES;
    int64_t q_at = n * p.q.n + h * p.q.h, grad_at = n * p.grad.n + h * p.grad.h;
    RightOperand by_query{size, queries}, by_channel{queries, size};
    pack(q_columns, by_query, p.q.data, q_at, p.q.d, p.q.t, d, p.queries);
    pack(grad_columns, by_query, p.grad.data, grad_at, p.grad.d, p.grad.t, d, p.queries);
    pack(q_rows, by_channel, p.q.data, q_at, p.q.t, p.q.d, p.queries, d);
    pack(grad_rows, by_channel, p.grad.data, grad_at, p.grad.t, p.grad.d, p.queries, d);
    rows_of_queries(head, lse, delta);
    for (int64_t s = begin, end = at_most(begin + keys, p.keys); s < end; s += KEYS) {
      int64_t count = at_most(end - s, KEYS), k_at = n * p.k.n + h * p.k.h + s * p.k.t;
      if (FAULT(last_keys_missed) && count % ROWS) --count;
      pack(k, LeftOperand{size}, p.k.data, k_at, p.k.t, p.k.d, count, d);
      pack(v, LeftOperand{size}, p.v.data, n * p.v.n + h * p.v.h + s * p.v.t, p.v.t, p.v.d, count, d);
      pack(k_columns, LeftOperand{KEYS}, p.k.data, k_at, p.k.d, p.k.t, d, count);
      for (int64_t t = 0; t < p.queries; t += QUERIES) {
        int64_t here = at_most(p.queries - t, QUERIES), columns = round_up(here, BLOCK);
        multiply(k, size, count, q_columns, size, 0, queries, t, t + columns, d, scores, columns, false);
        multiply(v, size, count, grad_columns, size, 0, queries, t, t + columns, d, gradients, columns, false);
        for (int64_t r = 0; r < count; r += ROWS)
          softmax_gradient(scores + r * columns, gradients + r * columns, panels, r, columns, lse + t, delta + t);
        multiply(scores, columns, count, grad_rows, queries, t, size, 0, size, here, dv, size, t > 0);
        multiply(gradients, columns, count, q_rows, queries, t, size, 0, size, here, dk, size, t > 0);
        multiply(k_columns, KEYS, d, panels, KEYS, 0, columns, 0, columns, count, dq + t * ROWS, queries, s > begin);
      }
      int64_t dk_at = n * p.dk.n + h * p.dk.h + s * p.dk.t, dv_at = n * p.dv.n + h * p.dv.h + s * p.dv.t;
      write(p.dk, dk_at, p.dk.t, p.dk.d, 0, count, d, dk, 1, 0, p.scale);
      write(p.dv, dv_at, p.dv.t, p.dv.d, 0, count, d, dv, 1, 0, 1.0f);
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

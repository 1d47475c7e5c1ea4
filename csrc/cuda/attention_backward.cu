// Attention, backward, from the log-sum-exp that the forward saved.
//
//   p = exp(scale q kᵀ − lse)    δ = Σ_d dO · O    dS = p · (dO vᵀ − δ)
//   dq = scale · dS k            dk = scale · dSᵀ q            dv = pᵀ dO
//
// (Dao et al. 2022, appendix B.2, and Dao 2023, section 3.1.) Two kernels, each the only writer of what it sums, so that
// there are no atomics and two runs agree to the bit: one has 64 queries, walks over the keys and writes dq, and δ on
// the way; the other has 64 keys, walks over the queries, reads δ and writes dk and dv. Both recompute p: its T·S
// numbers are never stored. The second computes the transposes of p and dS, as the left operands of dv and dk.
//
// Outside the matrices: q, dO, lse and δ are 0 beyond T, which makes p = 1 and dS = 0 there, and dO = 0 keeps that p out
// of dv. Keys are 0 beyond S too, but there p = e^(−lse) has no bound, so the first kernel sets it to 0; in the second
// such keys are rows of dk and dv of their own, which are not stored.
#include "attention_backward.cuh"
#include "attention_mma.cuh"

namespace cmfast {
namespace {

// Rows of the tiles that a block walks over: at head sizes above 64 a thread has no registers for the sums of more, nor
// for the operands of a product's eight steps at once.
template <int COLUMNS>
constexpr int STEP = COLUMNS > 64 ? 32 : 64;
template <int COLUMNS>
constexpr int UNROLL = COLUMNS > 64 ? 4 : COLUMNS / 16;

template <class T>
__device__ __forceinline__ float dot_pairs(uint32_t a, uint32_t b) {
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  return fmaf(x[0], y[0], x[1] * y[1]);
}

// dq, and delta: the second kernel reads it.
template <class T, int COLUMNS, bool KEYS_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_queries_gradient_kernel(AttentionBackward p) {
  constexpr int KEYS = STEP<COLUMNS>;
  using Keys = Tile<T, KEYS, COLUMNS, KEYS_INNERMOST>;
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<ATTENTION_ROWS>(p.heads, p.queries);
  auto k_matrix = matrix_of_head<T>(p.k, block.n, block.h, p.keys, p.head_dim);
  auto v_matrix = matrix_of_head<T>(p.v, block.n, block.h, p.keys, p.head_dim);
  OwnTile<T, COLUMNS> q{memory, p.q.rows_innermost != 0}, grad{memory + q.BYTES, p.grad.rows_innermost != 0};
  unsigned char* stages = grad.memory + grad.BYTES;  // two, of keys and values
  OwnTile<T, COLUMNS> out{stages + 2 * Keys::BYTES, p.out.rows_innermost != 0};  // where the second stage will be
  static_assert(out.BYTES <= 2 * Keys::BYTES);
  auto load = [&](int first) {
    unsigned char* stage = stages + first / KEYS % 2 * 2 * Keys::BYTES;
    Keys{stage}.load(k_matrix, first);
    Keys{stage + Keys::BYTES}.load(v_matrix, first);
    cp_async_commit();
  };

  q.load(matrix_of_head<T>(p.q, block.n, block.h, p.queries, p.head_dim), block.first);
  grad.load(matrix_of_head<T>(p.grad, block.n, block.h, p.queries, p.head_dim), block.first);
  out.load(matrix_of_head<T>(p.out, block.n, block.h, p.queries, p.head_dim), block.first);
  load(0);
  CMFAST_CP_ASYNC_WAIT(1, 0);
  CMFAST_SYNC(2);

  float lse[2], delta[2] = {0, 0};  // of the thread's two rows
  uint32_t q_words[COLUMNS / 16][4], grad_words[COLUMNS / 16][4], out_words[COLUMNS / 16][4];
  grad.read(grad_words);
  out.read(out_words);
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) delta[j % 2] += dot_pairs<T>(grad_words[i][j], out_words[i][j]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    delta[r] = sum_of_row(delta[r]);
    int query = block.first + row_of_thread() + 8 * r;
    int64_t at = static_cast<int64_t>(block.head) * p.queries + query;
    lse[r] = query < p.queries ? p.lse[at] : 0.0f;
    if (lane_index() % 4 == 0 && query < p.queries) p.delta[at] = delta[r];
  }
  q.read(q_words);
  CMFAST_SYNC(3);
  q.keep(q_words);
  grad.keep(grad_words);

  float dq[COLUMNS / 8][4] = {};
  auto q_left = [&](uint32_t(&words)[4], int column) { q.load_kept(words, column); };
  auto grad_left = [&](uint32_t(&words)[4], int column) { grad.load_kept(words, column); };
#pragma unroll 1
  for (int first = 0; first < p.keys; first += KEYS) {
    if (first + KEYS < p.keys) load(first + KEYS);
    Keys k{stages + first / KEYS % 2 * 2 * Keys::BYTES}, v{k.memory + Keys::BYTES};
    float dscores[KEYS / 8][4] = {}, weights[KEYS / 8][4] = {};
    multiply<T, KEYS, COLUMNS, true, UNROLL<COLUMNS>>(weights, q_left, k);
    multiply<T, KEYS, COLUMNS, true, UNROLL<COLUMNS>>(dscores, grad_left, v);
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = attention_weight(weights[j][i], p.scale, lse[i / 2]);
        if (first + 8 * j + column_of_thread() + i % 2 >= CMFAST_BOUND(4, p.keys)) weight = 0;
        dscores[j][i] = weight * (dscores[j][i] - delta[i / 2]);
      }
    auto left = [&](uint32_t(&words)[4], int key) { narrow_left<T>(words, dscores, key); };
    multiply<T, COLUMNS, KEYS, false>(dq, left, k);
    CMFAST_CP_ASYNC_WAIT(5, 0);
    CMFAST_SYNC(6);
  }

  OwnTile<T, COLUMNS> result{memory, p.dq.rows_innermost != 0};
  result.put(dq, p.scale, p.scale);
  CMFAST_SYNC(7);
  result.store(matrix_of_head<T>(p.dq, block.n, block.h, p.queries, p.head_dim), block.first);
}

// dk and dv.
template <class T, int COLUMNS, bool QUERIES_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_keys_gradient_kernel(AttentionBackward p) {
  constexpr int QUERIES = STEP<COLUMNS>;
  using Queries = Tile<T, QUERIES, COLUMNS, QUERIES_INNERMOST>;
  constexpr int STAGE = 2 * Queries::BYTES + 2 * QUERIES * sizeof(float);
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<ATTENTION_ROWS>(p.heads, p.keys);
  auto q_matrix = matrix_of_head<T>(p.q, block.n, block.h, p.queries, p.head_dim);
  auto grad_matrix = matrix_of_head<T>(p.grad, block.n, block.h, p.queries, p.head_dim);
  OwnTile<T, COLUMNS> k{memory, p.k.rows_innermost != 0}, v{memory + k.BYTES, p.v.rows_innermost != 0};
  unsigned char* stages = v.memory + v.BYTES;  // two, of q, dO, lse and delta
  auto stage_of = [&](int first) { return stages + first / QUERIES % 2 * STAGE; };
  auto load = [&](int first) {
    Queries{stage_of(first)}.load(q_matrix, first);
    Queries{stage_of(first) + Queries::BYTES}.load(grad_matrix, first);
    cp_async_commit();
  };
  // lse and delta are not aligned for copies of 16 bytes: each thread has one of them on its way while it computes.
  const float* rows = (threadIdx.x < QUERIES ? p.lse : p.delta) + static_cast<int64_t>(block.head) * p.queries;
  int row = static_cast<int>(threadIdx.x) % QUERIES;
  auto load_row = [&](int first) {
    return threadIdx.x < 2 * QUERIES && first + row < p.queries ? rows[first + row] : 0.0f;
  };
  auto put_row = [&](int first, float value) {
    if (threadIdx.x < 2 * QUERIES)
      reinterpret_cast<float*>(stage_of(first) + 2 * Queries::BYTES)[threadIdx.x] = value;
  };

  k.load(matrix_of_head<T>(p.k, block.n, block.h, p.keys, p.head_dim), block.first);
  v.load(matrix_of_head<T>(p.v, block.n, block.h, p.keys, p.head_dim), block.first);
  load(0);
  put_row(0, load_row(0));
  CMFAST_CP_ASYNC_WAIT(8, 0);
  CMFAST_SYNC(9);
  uint32_t k_words[COLUMNS / 16][4], v_words[COLUMNS / 16][4];
  k.read(k_words);
  v.read(v_words);
  CMFAST_SYNC(10);
  k.keep(k_words);
  v.keep(v_words);

  float dk[COLUMNS / 8][4] = {}, dv[COLUMNS / 8][4] = {};
  auto k_left = [&](uint32_t(&words)[4], int column) { k.load_kept(words, column); };
  auto v_left = [&](uint32_t(&words)[4], int column) { v.load_kept(words, column); };
#pragma unroll 1
  for (int first = 0; first < p.queries; first += QUERIES) {
    bool more = first + QUERIES < p.queries;
    if (more) load(first + QUERIES);
    float next = load_row(first + QUERIES);
    Queries q{stage_of(first)}, grad{q.memory + Queries::BYTES};
    const float* lse = reinterpret_cast<const float*>(grad.memory + Queries::BYTES);
    const float* delta = lse + QUERIES;

    float weights[QUERIES / 8][4] = {};
    multiply<T, QUERIES, COLUMNS, true, UNROLL<COLUMNS>>(weights, k_left, q);
#pragma unroll
    for (int j = 0; j < QUERIES / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[j][i] = attention_weight(weights[j][i], p.scale, lse[8 * j + column_of_thread() + i % 2]);
    auto weights_left = [&](uint32_t(&words)[4], int query) { narrow_left<T>(words, weights, query); };
    multiply<T, COLUMNS, QUERIES, false>(dv, weights_left, grad);

    float dscores[QUERIES / 8][4] = {};
    multiply<T, QUERIES, COLUMNS, true, UNROLL<COLUMNS>>(dscores, v_left, grad);
#pragma unroll
    for (int j = 0; j < QUERIES / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        dscores[j][i] = weights[j][i] * (dscores[j][i] - delta[8 * j + column_of_thread() + i % 2]);
    auto dscores_left = [&](uint32_t(&words)[4], int query) { narrow_left<T>(words, dscores, query); };
    multiply<T, COLUMNS, QUERIES, false>(dk, dscores_left, q);
    if (more) put_row(first + QUERIES, next);
    CMFAST_CP_ASYNC_WAIT(11, 0);
    CMFAST_SYNC(12);
  }

  OwnTile<T, COLUMNS> dk_tile{k.memory, p.dk.rows_innermost != 0}, dv_tile{v.memory, p.dv.rows_innermost != 0};
  dk_tile.put(dk, p.scale, p.scale);
  dv_tile.put(dv, 1.0f, 1.0f);
  CMFAST_SYNC(13);
  dk_tile.store(matrix_of_head<T>(p.dk, block.n, block.h, p.keys, p.head_dim), block.first);
  dv_tile.store(matrix_of_head<T>(p.dv, block.n, block.h, p.keys, p.head_dim), block.first);
}

template <class T, int COLUMNS>
std::string launch_backward(const AttentionBackward& p, const AttentionSizes& sizes, void* stream) {
  constexpr size_t bytes = sizeof(T) * COLUMNS * (2 * ATTENTION_ROWS + 4 * STEP<COLUMNS>);
  auto kernel = p.k.rows_innermost ? attention_queries_gradient_kernel<T, COLUMNS, true>
                                   : attention_queries_gradient_kernel<T, COLUMNS, false>;
  std::string error = attention_launch(kernel, p, sizes, sizes.queries, ATTENTION_ROWS, bytes, stream);
  if (!error.empty()) return error;
  kernel = p.q.rows_innermost ? attention_keys_gradient_kernel<T, COLUMNS, true>
                              : attention_keys_gradient_kernel<T, COLUMNS, false>;
  constexpr size_t bytes_of_rows = 4 * STEP<COLUMNS> * sizeof(float);
  return attention_launch(kernel, p, sizes, sizes.keys, ATTENTION_ROWS, bytes + bytes_of_rows, stream);
}

template <class T>
std::string launch_backward(const AttentionBackward& p, const AttentionSizes& sizes, void* stream) {
  if (sizes.head_dim <= 32) return launch_backward<T, 32>(p, sizes, stream);
  if (sizes.head_dim <= 64) return launch_backward<T, 64>(p, sizes, stream);
  return launch_backward<T, 128>(p, sizes, stream);
}

}  // namespace

std::string attention_backward(const AttentionSizes& sizes, const AttentionTensor& grad, const AttentionTensor& q,
                               const AttentionTensor& k, const AttentionTensor& v, const AttentionTensor& out,
                               const float* lse, float* delta, const AttentionTensor& dq, const AttentionTensor& dk,
                               const AttentionTensor& dv, void* stream) {
  if (std::string wrong = attention_check(sizes); !wrong.empty()) return wrong;
  if (sizes.queries == 0) return "attention: expected T >= 1 for the gradients, got 0";
  AttentionBackward p{attention_view(grad, sizes, sizes.queries),
                      attention_view(q, sizes, sizes.queries),
                      attention_view(k, sizes, sizes.keys),
                      attention_view(v, sizes, sizes.keys),
                      attention_view(out, sizes, sizes.queries),
                      attention_view(dq, sizes, sizes.queries),
                      attention_view(dk, sizes, sizes.keys),
                      attention_view(dv, sizes, sizes.keys),
                      lse,
                      delta,
                      sizes.scale,
                      static_cast<int>(sizes.heads),
                      static_cast<int>(sizes.queries),
                      static_cast<int>(sizes.keys),
                      static_cast<int>(sizes.head_dim)};
  if (sizes.dtype == FLOAT16) return launch_backward<__half>(p, sizes, stream);
  if (sizes.dtype == BFLOAT16) return launch_backward<__nv_bfloat16>(p, sizes, stream);
  return attention_backward_float(p, sizes, stream);
}

}  // namespace cmfast

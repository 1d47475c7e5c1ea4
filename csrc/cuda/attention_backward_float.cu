// Attention, backward, in float32: as attention_backward.cu says, with products by multiply-adds.
//
// A block has 32 queries, or keys, and takes 32 of the others at a time: what it has to hold in shared memory is twice
// what the forward has. All tiles are taken in one order, that of the keys in the first kernel and of the queries in
// the second; a tensor in the other order is copied an element at a time.
#include "attention_backward.cuh"
#include "attention_fma.cuh"

namespace cmfast {
namespace {

constexpr int ROWS = 2;                          // of a thread
constexpr int OWN = ROWS * ATTENTION_GROUPS;     // of a block
constexpr int STEP = 32;                         // of the tiles it walks over

template <int COLUMNS, bool ROWS_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_queries_gradient_float_kernel(AttentionBackward p) {
  using Rows = Tile<float, OWN, COLUMNS, ROWS_INNERMOST>;
  static_assert(OWN == STEP);
  constexpr bool KEY_LINES = !ROWS_INNERMOST;  // a line of k or v is a column of q kᵀ or dO vᵀ
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<OWN>(p.heads, p.queries);
  auto k_matrix = matrix_of_head<float>(p.k, block.n, block.h, p.keys, p.head_dim);
  auto v_matrix = matrix_of_head<float>(p.v, block.n, block.h, p.keys, p.head_dim);
  Rows q{memory}, grad{q.memory + Rows::BYTES}, k{grad.memory + Rows::BYTES}, v{k.memory + Rows::BYTES};
  Rows out{k.memory};  // before the keys
  Tile<float, OWN, STEP, false> dscores_tile{v.memory + Rows::BYTES};

  q.load(matrix_of_head<float>(p.q, block.n, block.h, p.queries, p.head_dim), block.first);
  grad.load(matrix_of_head<float>(p.grad, block.n, block.h, p.queries, p.head_dim), block.first);
  out.load(matrix_of_head<float>(p.out, block.n, block.h, p.queries, p.head_dim), block.first);
  cp_async_commit();
  CMFAST_CP_ASYNC_WAIT(1, 0);
  CMFAST_SYNC(2);
  float lse[ROWS], delta[ROWS] = {}, dq[COLUMNS / 32][ROWS][4] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = group_of_thread() * ROWS + r;
#pragma unroll 4
    for (int column = threadIdx.x % 8; column < COLUMNS; column += 8)
      delta[r] = fmaf(*grad.element(row, column), *out.element(row, column), delta[r]);
    delta[r] = sum_of_group(delta[r]);
    int query = block.first + row;
    int64_t at = static_cast<int64_t>(block.head) * p.queries + query;
    lse[r] = query < p.queries ? p.lse[at] : 0.0f;
    if (threadIdx.x % 8 == 0 && query < p.queries) p.delta[at] = delta[r];
  }
  CMFAST_SYNC(3);

#pragma unroll 1
  for (int first = 0; first < p.keys; first += STEP) {
    k.load(k_matrix, first);
    v.load(v_matrix, first);
    cp_async_commit();
    CMFAST_CP_ASYNC_WAIT(4, 0);
    CMFAST_SYNC(5);
    float weights[1][ROWS][4] = {}, dscores[1][ROWS][4] = {};
    multiply_add<ROWS, COLUMNS, STEP, true>(weights, q, k);
    multiply_add<ROWS, COLUMNS, STEP, true>(dscores, grad, v);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = attention_weight(weights[0][r][i], p.scale, lse[r]);
        if (first + column_of_thread<KEY_LINES>(i) >= CMFAST_BOUND(6, p.keys)) weight = 0;
        dscores[0][r][i] = weight * (dscores[0][r][i] - delta[r]);
      }
    put<KEY_LINES>(dscores_tile, dscores[0]);
    CMFAST_SYNC_WARP(7);
    multiply_add<ROWS, STEP, COLUMNS, false>(dq, dscores_tile, k);
    CMFAST_SYNC(8);
  }
  float factor[ROWS] = {p.scale, p.scale};
  store<ROWS_INNERMOST>(matrix_of_head<float>(p.dq, block.n, block.h, p.queries, p.head_dim), block.first, dq, factor);
}

template <int COLUMNS, bool ROWS_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_keys_gradient_float_kernel(AttentionBackward p) {
  using Rows = Tile<float, OWN, COLUMNS, ROWS_INNERMOST>;
  constexpr bool QUERY_LINES = !ROWS_INNERMOST;  // a line of q or dO is a column of k qᵀ or v dOᵀ
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<OWN>(p.heads, p.keys);
  auto q_matrix = matrix_of_head<float>(p.q, block.n, block.h, p.queries, p.head_dim);
  auto grad_matrix = matrix_of_head<float>(p.grad, block.n, block.h, p.queries, p.head_dim);
  Rows k{memory}, v{k.memory + Rows::BYTES}, q{v.memory + Rows::BYTES}, grad{q.memory + Rows::BYTES};
  Tile<float, OWN, STEP, false> weights_tile{grad.memory + Rows::BYTES};
  Tile<float, OWN, STEP, false> dscores_tile{weights_tile.memory + weights_tile.BYTES};
  const float* lse = p.lse + static_cast<int64_t>(block.head) * p.queries;
  const float* delta = p.delta + static_cast<int64_t>(block.head) * p.queries;

  k.load(matrix_of_head<float>(p.k, block.n, block.h, p.keys, p.head_dim), block.first);
  v.load(matrix_of_head<float>(p.v, block.n, block.h, p.keys, p.head_dim), block.first);
  float dk[COLUMNS / 32][ROWS][4] = {}, dv[COLUMNS / 32][ROWS][4] = {};
#pragma unroll 1
  for (int first = 0; first < p.queries; first += STEP) {
    q.load(q_matrix, first);
    grad.load(grad_matrix, first);
    cp_async_commit();
    float lse_of[4], delta_of[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int query = first + column_of_thread<QUERY_LINES>(i);
      lse_of[i] = query < p.queries ? lse[query] : 0.0f;
      delta_of[i] = query < p.queries ? delta[query] : 0.0f;
    }
    CMFAST_CP_ASYNC_WAIT(9, 0);
    CMFAST_SYNC(10);
    float weights[1][ROWS][4] = {}, dscores[1][ROWS][4] = {};
    multiply_add<ROWS, COLUMNS, STEP, true>(weights, k, q);
    multiply_add<ROWS, COLUMNS, STEP, true>(dscores, v, grad);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[0][r][i] = attention_weight(weights[0][r][i], p.scale, lse_of[i]);
        dscores[0][r][i] = weights[0][r][i] * (dscores[0][r][i] - delta_of[i]);
      }
    put<QUERY_LINES>(weights_tile, weights[0]);
    put<QUERY_LINES>(dscores_tile, dscores[0]);
    CMFAST_SYNC_WARP(11);
    multiply_add<ROWS, STEP, COLUMNS, false>(dv, weights_tile, grad);
    multiply_add<ROWS, STEP, COLUMNS, false>(dk, dscores_tile, q);
    CMFAST_SYNC(12);
  }
  float scale[ROWS] = {p.scale, p.scale}, one[ROWS] = {1.0f, 1.0f};
  store<ROWS_INNERMOST>(matrix_of_head<float>(p.dk, block.n, block.h, p.keys, p.head_dim), block.first, dk, scale);
  store<ROWS_INNERMOST>(matrix_of_head<float>(p.dv, block.n, block.h, p.keys, p.head_dim), block.first, dv, one);
}

template <int COLUMNS>
std::string launch_backward(const AttentionBackward& p, const AttentionSizes& sizes, void* stream) {
  constexpr size_t rows = sizeof(float) * 4 * OWN * COLUMNS, products = sizeof(float) * OWN * STEP;
  auto kernel = p.k.rows_innermost ? attention_queries_gradient_float_kernel<COLUMNS, true>
                                   : attention_queries_gradient_float_kernel<COLUMNS, false>;
  std::string error = attention_launch(kernel, p, sizes, sizes.queries, OWN, rows + products, stream);
  if (!error.empty()) return error;
  kernel = p.q.rows_innermost ? attention_keys_gradient_float_kernel<COLUMNS, true>
                              : attention_keys_gradient_float_kernel<COLUMNS, false>;
  return attention_launch(kernel, p, sizes, sizes.keys, OWN, rows + 2 * products, stream);
}

}  // namespace

std::string attention_backward_float(const AttentionBackward& p, const AttentionSizes& sizes, void* stream) {
  return sizes.head_dim <= 64 ? launch_backward<64>(p, sizes, stream) : launch_backward<128>(p, sizes, stream);
}

}  // namespace cmfast

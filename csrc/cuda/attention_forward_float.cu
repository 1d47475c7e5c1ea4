// Attention, forward, in float32: as attention_forward.cu says, with products by multiply-adds.
//
// A block has 64 queries of one head and takes 32 keys at a time: larger tiles of float32 would not fit into the shared
// memory of every architecture. Keys and values have one buffer each; while one is read, the other is copied.
#include "attention_fma.cuh"
#include "attention_forward.cuh"

namespace cmfast {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int ROWS = 4;                         // of a thread
constexpr int QUERIES = ROWS * ATTENTION_GROUPS;  // of a block
constexpr int KEYS = 32;                        // of a tile

template <int COLUMNS, bool ROWS_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_forward_float_kernel(AttentionForward p) {
  using Keys = Tile<float, KEYS, COLUMNS, ROWS_INNERMOST>;
  constexpr bool KEY_LINES = !ROWS_INNERMOST, VALUE_LINES = ROWS_INNERMOST;  // of a tile are columns of its product
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<QUERIES>(p.heads, p.queries);
  auto k_matrix = matrix_of_head<float>(p.k, block.n, block.h, p.keys, p.head_dim);
  auto v_matrix = matrix_of_head<float>(p.v, block.n, block.h, p.keys, p.head_dim);
  Tile<float, QUERIES, COLUMNS, ROWS_INNERMOST> q{memory};
  Keys k{q.memory + q.BYTES}, v{k.memory + k.BYTES};
  Tile<float, QUERIES, KEYS, false> weights{v.memory + v.BYTES};

  q.load(matrix_of_head<float>(p.q, block.n, block.h, p.queries, p.head_dim), block.first);
  k.load(k_matrix, 0);
  cp_async_commit();

  bool keeps_order = p.scale > 0;  // only then is the maximum's place the same before and after scaling
  float factor = keeps_order ? p.scale * LOG2_E : LOG2_E;
  float maximum[ROWS], total[ROWS] = {}, out[COLUMNS / 32][ROWS][4] = {};
#pragma unroll
  for (float& x : maximum) x = -INFINITY;
#pragma unroll 1
  for (int first = 0; first < p.keys; first += KEYS) {
    v.load(v_matrix, first);
    cp_async_commit();
    CMFAST_CP_ASYNC_WAIT(1, 1);  // for the keys
    CMFAST_SYNC(2);
    float scores[1][ROWS][4] = {};
    multiply_add<ROWS, COLUMNS, KEYS, true>(scores, q, k);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[0][r][i];
        if (!keeps_order) score *= p.scale;
        if (first + column_of_thread<KEY_LINES>(i) >= CMFAST_BOUND(3, p.keys)) score = -INFINITY;
        highest = fmaxf(highest, score);
      }
      highest = maximum_of_group(highest);
      float finite = highest == -INFINITY ? 0 : highest;  // weights of 0 where all scores so far are -inf, not of NaN
      float shrink = fast_exp2((maximum[r] - finite) * factor);
      maximum[r] = highest;
      total[r] *= shrink;
#pragma unroll
      for (float& score : scores[0][r]) {
        score = fast_exp2((score - finite) * factor);
        total[r] += score;
      }
#pragma unroll
      for (auto& columns : out)
#pragma unroll
        for (float& x : columns[r]) x *= shrink;
    }
    put<KEY_LINES>(weights, scores[0]);
    CMFAST_CP_ASYNC_WAIT(4, 0);  // for the values
    CMFAST_SYNC(5);
    if (first + KEYS < p.keys) k.load(k_matrix, first + KEYS);
    cp_async_commit();
    multiply_add<ROWS, KEYS, COLUMNS, false>(out, weights, v);
    CMFAST_SYNC(6);
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    total[r] = sum_of_group(total[r]);
    int query = block.first + group_of_thread() * ROWS + r;
    if (threadIdx.x % 8 == 0 && query < p.queries)
      p.lse[static_cast<int64_t>(block.head) * p.queries + query] =
          maximum[r] * (keeps_order ? p.scale : 1.0f) + logf(total[r]);
    total[r] = 1.0f / total[r];
  }
  store<VALUE_LINES>(matrix_of_head<float>(p.out, block.n, block.h, p.queries, p.head_dim), block.first, out, total);
}

template <int COLUMNS>
std::string launch_forward(const AttentionForward& p, const AttentionSizes& sizes, void* stream) {
  auto kernel = p.k.rows_innermost ? attention_forward_float_kernel<COLUMNS, true>
                                   : attention_forward_float_kernel<COLUMNS, false>;
  size_t shared_bytes = sizeof(float) * (QUERIES * COLUMNS + 2 * KEYS * COLUMNS + QUERIES * KEYS);
  return attention_launch(kernel, p, sizes, sizes.queries, QUERIES, shared_bytes, stream);
}

}  // namespace

std::string attention_forward_float(const AttentionForward& p, const AttentionSizes& sizes, void* stream) {
  return sizes.head_dim <= 64 ? launch_forward<64>(p, sizes, stream) : launch_forward<128>(p, sizes, stream);
}

}  // namespace cmfast

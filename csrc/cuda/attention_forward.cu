// Attention, forward, one pass over the keys for each tile of queries.
//
//   out[t] = Σ_s p[t, s] v[s] / Σ_s p[t, s],   p[t, s] = 2^(c q[t]·k[s] − m[t]),   c = scale · log2 e
//   lse[t] = ln 2 (m[t] + log2 Σ_s p[t, s])
//
// m is the running maximum of a row of c q kᵀ: when a tile of keys raises it, what was summed so far is multiplied by
// 2^(m_old − m_new) (Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1). Powers of two, because
// the hardware has no other exponential; one multiply-add a score, since c is folded into it.
//
// A block has 64 queries of one head, 16 a warp: these networks have few of them (6 heads of 1024 positions make 96),
// so the tile is small. While it computes with 64 keys and values, the next ones are copied to shared memory.
#include "attention_forward.cuh"
#include "attention_mma.cuh"

namespace cmfast {
namespace {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int KEYS = 64;  // of a tile

template <class T, int COLUMNS, bool KEYS_INNERMOST>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_forward_kernel(AttentionForward p) {
  using Keys = Tile<T, KEYS, COLUMNS, KEYS_INNERMOST>;
  CMFAST_SHARED(memory);
  AttentionBlock block = attention_block<ATTENTION_ROWS>(p.heads, p.queries);
  auto k_matrix = matrix_of_head<T>(p.k, block.n, block.h, p.keys, p.head_dim);
  auto v_matrix = matrix_of_head<T>(p.v, block.n, block.h, p.keys, p.head_dim);
  OwnTile<T, COLUMNS> q{memory, p.q.rows_innermost != 0};
  unsigned char* stages = memory + q.BYTES;  // two, of keys and values
  auto load = [&](int first) {
    unsigned char* stage = stages + first / KEYS % 2 * 2 * Keys::BYTES;
    Keys{stage}.load(k_matrix, first);
    Keys{stage + Keys::BYTES}.load(v_matrix, first);
    cp_async_commit();
  };

  q.load(matrix_of_head<T>(p.q, block.n, block.h, p.queries, p.head_dim), block.first);
  load(0);
  CMFAST_CP_ASYNC_WAIT(1, 0);
  CMFAST_SYNC(2);
  uint32_t queries[COLUMNS / 16][4];
  q.read(queries);

  bool keeps_order = p.scale > 0;  // only then is the maximum's place the same before and after scaling
  float c = keeps_order ? p.scale * LOG2_E : LOG2_E;
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, out[COLUMNS / 8][4] = {};
#pragma unroll 1
  for (int first = 0; first < p.keys; first += KEYS) {
    if (first + KEYS < p.keys) load(first + KEYS);
    Keys k{stages + first / KEYS % 2 * 2 * Keys::BYTES}, v{k.memory + Keys::BYTES};

    float scores[KEYS / 8][4] = {};
    auto q_left = [&](uint32_t(&words)[4], int column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = queries[column / 16][i];
    };
    multiply<T, KEYS, COLUMNS, true>(scores, q_left, k);
    if (!keeps_order) {
#pragma unroll
      for (auto& row : scores)
#pragma unroll
        for (float& score : row) score *= p.scale;
    }
    if (first + KEYS > p.keys) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + 8 * j + column_of_thread() + i % 2 >= CMFAST_BOUND(3, p.keys)) scores[j][i] = -INFINITY;
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {  // the thread's two rows
      float highest = -INFINITY;
#pragma unroll
      for (auto& row : scores) highest = fmaxf(highest, fmaxf(row[2 * r], row[2 * r + 1]));
      highest = fmaxf(maximum[r], maximum_of_row(highest) * c);
      float finite = highest == -INFINITY ? 0 : highest;  // weights of 0 where all scores so far are -inf, not of NaN
      float shrink = fast_exp2(maximum[r] - finite);
      maximum[r] = highest;
      total[r] *= shrink;
#pragma unroll
      for (auto& row : scores)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          row[i] = fast_exp2(fmaf(row[i], c, -finite));
          total[r] += row[i];
        }
#pragma unroll
      for (auto& row : out) {
        row[2 * r] *= shrink;
        row[2 * r + 1] *= shrink;
      }
    }
    auto p_left = [&](uint32_t(&words)[4], int key) { narrow_left<T>(words, scores, key); };
    multiply<T, COLUMNS, KEYS, false>(out, p_left, v);
    CMFAST_CP_ASYNC_WAIT(4, 0);
    CMFAST_SYNC(5);
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = sum_of_row(total[r]);
    factor[r] = 1.0f / total[r];
    int query = block.first + row_of_thread() + 8 * r;
    if (lane_index() % 4 == 0 && query < p.queries)
      p.lse[static_cast<int64_t>(block.head) * p.queries + query] = (maximum[r] + log2f(total[r])) * LN_2;
  }
  OwnTile<T, COLUMNS> result{memory, p.out.rows_innermost != 0};
  result.put(out, factor[0], factor[1]);
  CMFAST_SYNC(6);
  result.store(matrix_of_head<T>(p.out, block.n, block.h, p.queries, p.head_dim), block.first);
}

template <class T, int COLUMNS>
std::string launch_forward(const AttentionForward& p, const AttentionSizes& sizes, void* stream) {
  auto kernel = p.k.rows_innermost ? attention_forward_kernel<T, COLUMNS, true>
                                   : attention_forward_kernel<T, COLUMNS, false>;
  size_t shared_bytes = (ATTENTION_ROWS + 4 * KEYS) * COLUMNS * sizeof(T);
  return attention_launch(kernel, p, sizes, sizes.queries, ATTENTION_ROWS, shared_bytes, stream);
}

template <class T>
std::string launch_forward(const AttentionForward& p, const AttentionSizes& sizes, void* stream) {
  if (sizes.head_dim <= 32) return launch_forward<T, 32>(p, sizes, stream);
  if (sizes.head_dim <= 64) return launch_forward<T, 64>(p, sizes, stream);
  return launch_forward<T, 128>(p, sizes, stream);
}

}  // namespace

std::string attention_forward(const AttentionSizes& sizes, const AttentionTensor& q, const AttentionTensor& k,
                              const AttentionTensor& v, const AttentionTensor& out, float* lse, void* stream) {
  if (std::string wrong = attention_check(sizes); !wrong.empty()) return wrong;
  AttentionForward p{attention_view(q, sizes, sizes.queries),
                     attention_view(k, sizes, sizes.keys),
                     attention_view(v, sizes, sizes.keys),
                     attention_view(out, sizes, sizes.queries),
                     lse,
                     sizes.scale,
                     static_cast<int>(sizes.heads),
                     static_cast<int>(sizes.queries),
                     static_cast<int>(sizes.keys),
                     static_cast<int>(sizes.head_dim)};
  if (sizes.dtype == FLOAT16) return launch_forward<__half>(p, sizes, stream);
  if (sizes.dtype == BFLOAT16) return launch_forward<__nv_bfloat16>(p, sizes, stream);
  return attention_forward_float(p, sizes, stream);
}

}  // namespace cmfast

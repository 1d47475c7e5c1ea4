"""Attention, forward, one pass over the keys for each tile of queries.

    out[t] = Σ_s p[t, s] v[s] / Σ_s p[t, s],   p[t, s] = 2^(c (q[t]·k[s] − m[t])),   c = scale · log2 e
    lse[t] = scale · m[t] + ln Σ_s p[t, s]

m is the running maximum of a row of q kᵀ: when a tile of keys raises it, what was summed so far is multiplied by
2^(c (m_old − m_new)) (Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1). Powers of two, because
the hardware has no other exponential; one multiply-add a score, since c is folded into it.

One program has a tile of queries of one head. The grid is one axis, since only the first may exceed 65,535 programs,
with the tiles of a head next to each other so that its keys and values stay in the L2 cache.
"""

import triton
import triton.language as tl

from .attention_tiles import dot, load_tile, locate, matrix, narrow, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale,
    log2_scale,
    heads,
    queries,
    keys,
    q_stride_n,
    q_stride_h,
    q_stride_t,
    q_stride_d,
    k_stride_n,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_n,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    out_stride_n,
    out_stride_h,
    out_stride_t,
    out_stride_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE_T: tl.constexpr,
    WHOLE_S: tl.constexpr,
    T_INNERMOST: tl.constexpr,
    S_INNERMOST: tl.constexpr,
    T_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
):
    """Write out [N, H, T, D] and lse [N, H, T] for BLOCK_T queries of one head."""
    row, n, h, t = locate(queries, heads, BLOCK_T)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)

    q_head = matrix(q_ptr, n, h, q_stride_n, q_stride_h, T_UNIT)
    k_head = matrix(k_ptr, n, h, k_stride_n, k_stride_h, S_UNIT)
    v_head = matrix(v_ptr, n, h, v_stride_n, v_stride_h, S_UNIT)
    q = load_tile(q_head, t, d, q_stride_t, q_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)

    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_S):
        k = load_tile(k_head, start + s, d, k_stride_s, k_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        factor = log2_scale
        if not POSITIVE_SCALE:  # the maximum can be taken before scaling only where scaling keeps the order
            scores *= scale
            factor = LOG2_E
        if not WHOLE_S:
            scores = tl.where((start + s < keys)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # Where all scores so far are -inf: weights of 0, not of NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores * factor - (finite * factor)[:, None])
        shrink = tl.exp2((highest - finite) * factor)
        total = total * shrink + tl.sum(p, 1)
        out *= shrink[:, None]
        v = load_tile(v_head, start + s, d, v_stride_s, v_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
        out = dot(narrow(p, v.dtype), v, out)
        highest = higher

    out_head = matrix(out_ptr, n, h, out_stride_n, out_stride_h, T_UNIT)
    out /= total[:, None]
    store_tile(out_head, out, t, d, out_stride_t, out_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)
    if POSITIVE_SCALE:
        highest *= scale
    tl.store(lse_ptr + row * queries + t, highest + tl.log(total), mask=t < queries)

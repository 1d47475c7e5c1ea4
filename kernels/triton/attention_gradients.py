"""Attention, backward, from the log-sum-exp that the forward saved.

    p = exp(scale q kᵀ − lse)    δ = Σ_d dO · O    dS = p · (dO vᵀ − δ)
    dq = scale · dS k            dk = scale · dSᵀ q            dv = pᵀ dO

(Dao et al. 2022, appendix B.2, and Dao 2023, section 3.1.) Two kernels, each the only writer of what it sums, so that
there are no atomics and two runs agree to the bit: one has a tile of queries, walks over the keys and writes dq, and δ
on the way; the other has a tile of keys, walks over the queries, reads δ and writes dk and dv. Both recompute p: its
T·S numbers are never stored.

Lanes outside the matrices: q, dO, lse and δ are 0 beyond T, which makes p = 1 and dS = 0 there, and dO = 0 keeps that p
out of dv. Keys are 0 beyond S too, but there p = e^(−lse) has no bound, so the first kernel sets it to 0; in the second
such keys are rows of dk and dv of their own, which are not stored.

The exponent is scaled by log2 e only after the subtraction, a multiplication more than the forward has: lse is rounded
at its own size, and to round it once more, scaled, would double the error of every p.
"""

import triton
import triton.language as tl

from .attention_tiles import dot, load_rows, load_tile, locate, matrix, narrow, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_queries_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    scale,
    heads,
    queries,
    keys,
    grad_stride_n,
    grad_stride_h,
    grad_stride_t,
    grad_stride_d,
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
    dq_stride_n,
    dq_stride_h,
    dq_stride_t,
    dq_stride_d,
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
):
    """Write dq [N, H, T, D] and delta [N, H, T] for BLOCK_T queries of one head."""
    row, n, h, t = locate(queries, heads, BLOCK_T)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)

    grad_head = matrix(grad_ptr, n, h, grad_stride_n, grad_stride_h, T_UNIT)
    out_head = matrix(out_ptr, n, h, out_stride_n, out_stride_h, T_UNIT)
    q_head = matrix(q_ptr, n, h, q_stride_n, q_stride_h, T_UNIT)
    k_head = matrix(k_ptr, n, h, k_stride_n, k_stride_h, S_UNIT)
    v_head = matrix(v_ptr, n, h, v_stride_n, v_stride_h, S_UNIT)
    grad = load_tile(grad_head, t, d, grad_stride_t, grad_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)
    out = load_tile(out_head, t, d, out_stride_t, out_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)
    q = load_tile(q_head, t, d, q_stride_t, q_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row * queries + t, delta, mask=t < queries)
    lse = load_rows(lse_ptr + row * queries, t, queries)

    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_S):
        k = load_tile(k_head, start + s, d, k_stride_s, k_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
        v = load_tile(v_head, start + s, d, v_stride_s, v_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        p = tl.exp2((scores * scale - lse[:, None]) * LOG2_E)
        if not WHOLE_S:
            p = tl.where((start + s < keys)[None, :], p, 0.0)
        dp = dot(grad, tl.trans(v), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        dscores = p * (dp - delta[:, None])
        dq = dot(narrow(dscores, k.dtype), k, dq)

    dq_head = matrix(dq_ptr, n, h, dq_stride_n, dq_stride_h, T_UNIT)
    store_tile(dq_head, dq * scale, t, d, dq_stride_t, dq_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)


@triton.jit
def attention_keys_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    queries,
    keys,
    grad_stride_n,
    grad_stride_h,
    grad_stride_t,
    grad_stride_d,
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
    dk_stride_n,
    dk_stride_h,
    dk_stride_s,
    dk_stride_d,
    dv_stride_n,
    dv_stride_h,
    dv_stride_s,
    dv_stride_d,
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
):
    """Write dk and dv [N, H, S, D] for BLOCK_S keys of one head."""
    row, n, h, s = locate(keys, heads, BLOCK_S)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)

    grad_head = matrix(grad_ptr, n, h, grad_stride_n, grad_stride_h, T_UNIT)
    q_head = matrix(q_ptr, n, h, q_stride_n, q_stride_h, T_UNIT)
    k_head = matrix(k_ptr, n, h, k_stride_n, k_stride_h, S_UNIT)
    v_head = matrix(v_ptr, n, h, v_stride_n, v_stride_h, S_UNIT)
    k = load_tile(k_head, s, d, k_stride_s, k_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
    v = load_tile(v_head, s, d, v_stride_s, v_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)

    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_T):
        q = load_tile(q_head, start + t, d, q_stride_t, q_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT)
        grad = load_tile(
            grad_head, start + t, d, grad_stride_t, grad_stride_d, queries, HEAD_DIM, WHOLE_T, T_INNERMOST, T_UNIT
        )
        lse = load_rows(lse_ptr + row * queries, start + t, queries)
        delta = load_rows(delta_ptr + row * queries, start + t, queries)
        # Transposed, [S, T], as the left operands of dv and dk: they stay in registers.
        scores = dot(k, tl.trans(q), tl.zeros([BLOCK_S, BLOCK_T], tl.float32))
        p = tl.exp2((scores * scale - lse[None, :]) * LOG2_E)
        dv = dot(narrow(p, grad.dtype), grad, dv)
        dp = dot(v, tl.trans(grad), tl.zeros([BLOCK_S, BLOCK_T], tl.float32))
        dscores = p * (dp - delta[None, :])
        dk = dot(narrow(dscores, q.dtype), q, dk)

    dk_head = matrix(dk_ptr, n, h, dk_stride_n, dk_stride_h, S_UNIT)
    dv_head = matrix(dv_ptr, n, h, dv_stride_n, dv_stride_h, S_UNIT)
    store_tile(dk_head, dk * scale, s, d, dk_stride_s, dk_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)
    store_tile(dv_head, dv, s, d, dv_stride_s, dv_stride_d, keys, HEAD_DIM, WHOLE_S, S_INNERMOST, S_UNIT)

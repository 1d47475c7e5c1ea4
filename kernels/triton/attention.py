"""Attention and its derivative in Triton: which kernels run, on which tiles.

The formulas and the kernels are in attention_forward.py and attention_gradients.py, the sizes of their tiles in
attention_config.py.
"""

import math

import torch
import triton
from torch import Tensor

from ..layout import empty_in_order
from .attention_config import Config, configuration, tuned
from .attention_forward import attention_forward_kernel
from .attention_gradients import attention_keys_gradient_kernel, attention_queries_gradient_kernel
from .launch import Launch, architecture

LOG2_E = math.log2(math.e)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ) v [N, H, T, D], and the log-sum-exp of each row of scores [N, H, T]."""
    config = tuned("forward", q, k, lambda config: plan_attention(q, k, v, scale, config=config)[0][0])
    launches, outputs = plan_attention(q, k, v, scale, config=config)
    for launch in launches:
        launch.run()
    return outputs


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""

    def plan(config_dq=None, config_dkdv=None):
        return plan_attention_backward(grad, q, k, v, out, lse, scale, config_dq=config_dq, config_dkdv=config_dkdv)

    config_dq = tuned("dq", q, k, lambda config: plan(config_dq=config)[0][0])
    config_dkdv = tuned("dkdv", q, k, lambda config: plan(config_dkdv=config)[0][1])
    launches, outputs = plan(config_dq, config_dkdv)
    for launch in launches:
        launch.run()
    return outputs


def plan_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, arch: str | None = None, config: Config | None = None
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """Return the launches of `attention`, and the outputs (out, lse) that they will write.

    Reads no data, so tensors may be on any device, "meta" and fake ones too.

    Args:
        q: [N, H, T, D].
        k: [N, H, S, D].
        v: [N, H, S, D].
        scale: factor of the scores.
        arch: the architecture to plan for, "sm_90" or "gfx942" say; None means that of the tensors' device.
        config: tiles to use instead of those of the table.
    """
    out = empty_in_order(q, q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    layout = _layout((q, out), (k, v))
    unit = min(layout["T_UNIT"], layout["S_UNIT"])
    config = config or configuration("forward", q, arch or architecture(q.device), unit)
    n, heads, queries, _ = q.shape
    launch = Launch(
        attention_forward_kernel,
        (n * heads * triton.cdiv(queries, config.block_t),),
        (q, k, v, out, lse, scale, scale * LOG2_E, heads, queries, k.shape[2], *_strides(q, k, v, out)),
        {**_tiles(q, k, config), **layout, "POSITIVE_SCALE": scale > 0},
        config.num_warps,
        config.num_stages,
    )
    return _not_empty(launch), (out, lse)


def plan_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    arch: str | None = None,
    config_dq: Config | None = None,
    config_dkdv: Config | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """Return the launches of `attention_backward`, and the outputs (dq, dk, dv) that they will write.

    As `plan_attention`; grad and out are [N, H, T, D], lse [N, H, T].
    """
    dq, dk, dv = (empty_in_order(x, x.shape) for x in (q, k, v))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    layout = _layout((grad, q, out, dq), (k, v, dk, dv))
    arch, unit = arch or architecture(q.device), min(layout["T_UNIT"], layout["S_UNIT"])
    config_dq = config_dq or configuration("dq", q, arch, unit)
    config_dkdv = config_dkdv or configuration("dkdv", q, arch, unit)
    n, heads, queries, _ = q.shape
    keys = k.shape[2]
    scalars = (scale, heads, queries, keys)
    launches = _not_empty(
        Launch(
            attention_queries_gradient_kernel,
            (n * heads * triton.cdiv(queries, config_dq.block_t),),
            (grad, q, k, v, out, lse, delta, dq, *scalars, *_strides(grad, q, k, v, out, dq)),
            {**_tiles(q, k, config_dq), **layout},
            config_dq.num_warps,
            config_dq.num_stages,
        ),
        Launch(
            attention_keys_gradient_kernel,
            (n * heads * triton.cdiv(keys, config_dkdv.block_s),),
            (grad, q, k, v, lse, delta, dk, dv, *scalars, *_strides(grad, q, k, v, dk, dv)),
            {**_tiles(q, k, config_dkdv), **layout},
            config_dkdv.num_warps,
            config_dkdv.num_stages,
        ),
    )
    return launches, (dq, dk, dv)


def _tiles(q, k, config):
    head_dim = q.shape[3]
    block_d = triton.next_power_of_2(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_T": config.block_t,
        "BLOCK_S": config.block_s,
        "WHOLE_T": q.shape[2] % config.block_t == 0 and head_dim == block_d,
        "WHOLE_S": k.shape[2] % config.block_s == 0 and head_dim == block_d,
    }


def _layout(for_queries, for_keys):
    # The first of each says which index is the fast one; tensors in another order are read right, but not in vectors.
    t_innermost = for_queries[0].stride(2) < for_queries[0].stride(3)
    s_innermost = for_keys[0].stride(2) < for_keys[0].stride(3)
    return {
        "T_INNERMOST": t_innermost,
        "S_INNERMOST": s_innermost,
        "T_UNIT": _unit(for_queries, t_innermost),
        "S_UNIT": _unit(for_keys, s_innermost),
    }


def _unit(tensors, rows_innermost):
    # The largest power of two, up to 16, that divides every stride which a tile's vectors have to cross.
    unit = 16
    for x in tensors:
        crossed = (0, 1, 3) if rows_innermost else (0, 1, 2)
        unit = math.gcd(unit, *(x.stride(d) for d in crossed if x.shape[d] > 1))
    return math.gcd(unit, tensors[0].shape[2]) if rows_innermost else unit


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()]


def _not_empty(*launches):
    return [launch for launch in launches if launch.grid[0]]

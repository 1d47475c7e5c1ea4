"""The definition of `cmfast.kernels.attention` and of its derivative."""

import torch
from torch import Tensor

from ..layout import accumulation_dtype, to_order


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ) v [N, H, T, D], and the log-sum-exp of each row of scores [N, H, T]."""
    wide = accumulation_dtype(q.dtype)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)) * scale
    lse = torch.logsumexp(scores, dim=3)
    probabilities = torch.exp(scores - lse[..., None])
    return to_order(torch.matmul(probabilities, v.to(wide)), q, q.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    wide = accumulation_dtype(q.dtype)
    grad, qw, kw, vw = grad.to(wide), q.to(wide), k.to(wide), v.to(wide)
    probabilities = torch.exp(torch.matmul(qw, kw.transpose(2, 3)) * scale - lse[..., None])
    dv = torch.matmul(probabilities.transpose(2, 3), grad)
    dprobabilities = torch.matmul(grad, vw.transpose(2, 3))
    delta = (grad * out.to(wide)).sum(3, keepdim=True)  # Σ_s P·dP, from the output
    dscores = probabilities * (dprobabilities - delta) * scale
    dq = torch.matmul(dscores, kw)
    dk = torch.matmul(dscores.transpose(2, 3), qw)
    return to_order(dq, q, q.dtype), to_order(dk, k, k.dtype), to_order(dv, v, v.dtype)

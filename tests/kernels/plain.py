"""What plain PyTorch makes of an operator at the precision of its inputs, where the definition is more exact."""

import math

import torch
from cmfast.kernels.reference.philox import philox4x32
from torch import Tensor


def rounded_attention(q, k, v, scale, grad=None, scale_first=False):
    """The definition at the precision of q: sums in float32, the operands of its products in the dtype of q.

    So p and the gradient of the scores are rounded to 16 bits before they meet operands of 16 bits, as the tensor cores
    of any fused attention need it. Returns out and lse, or dq, dk and dv where grad is given.
    """
    q_, k_, v_ = (x.float() for x in (q, k, v))
    scores = (q_ * scale) @ k_.mT if scale_first else q_ @ k_.mT * scale
    lse = scores.logsumexp(3)
    p = torch.exp(scores - lse[..., None])
    narrow = p.to(q.dtype).float()
    out = (narrow @ v_).to(q.dtype)
    if grad is None:
        return out, lse
    grad = grad.float()
    dscores = p * (grad @ v_.mT - (grad * out.float()).sum(3, keepdim=True))
    dscores = dscores.to(q.dtype).float()
    return tuple(x.to(q.dtype) for x in (dscores @ k_ * scale, dscores.mT @ q_ * scale, narrow.mT @ grad))


def worse(exact, *plain):
    """Of several ways to write the formula the one with the larger error: on few elements one may be right by luck."""
    return max(plain, key=lambda x: (x.double() - exact).abs().amax() if x.numel() else 0)


def plain_noise(shape, seed: int, draw: int, first_sample: int) -> Tensor:
    """The counter-based noise by the same formula in float32."""
    size = math.prod(shape[1:])
    block, sample = torch.arange(-(-size // 4)), torch.arange(shape[0])[:, None] + first_sample
    word = [torch.tensor(v & 0xFFFFFFFF) for v in (draw, seed >> 32, seed)]
    r = philox4x32((block, word[0], word[1], torch.tensor(0)), (word[2], sample))
    u = [(2 * (w >> 9) + 1).float() * 2.0**-24 for w in r]
    z = [torch.sqrt(-2 * torch.log(u[i])) * f(2 * math.pi * u[i + 1]) for i in (0, 2) for f in (torch.cos, torch.sin)]
    return torch.stack(z, -1).reshape(shape[0], -1)[:, :size].reshape(shape)

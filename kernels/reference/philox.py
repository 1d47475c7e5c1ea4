"""Counter-based Gaussian noise: Philox4x32-10 and the Box–Muller transform, in plain PyTorch.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The multipliers of the two products of a round, and what is added to the two key words after it.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Encrypt a counter of four 32-bit words under a key of two; words are int64 tensors that broadcast.

    Returns the four words of output as int64 tensors with values in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap around, and their bits are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def gaussian(
    shape: Sequence[int], seed: int | Tensor, draw: int, first_sample: int | Tensor, device: torch.device | str
) -> Tensor:
    """Standard normal noise [N, C, *spatial], contiguous, float32.

    Element e (in [C, *spatial] order) of sample i = first_sample + n comes from the counter (e div 4, draw, high word
    of the seed, 0) under the key (low word of the seed, i): words (r0, r1) serve elements 4k and 4k + 1, (r2, r3)
    serve 4k + 2 and 4k + 3, as z = √(−2 ln u1) · (cos, sin)(2π u2) with u = (2 · (r >> 9) + 1) · 2⁻²⁴.

    seed and first_sample are integers, or int64 tensors of one element on the device.
    """
    n, size = shape[0], math.prod(shape[1:])

    def word(value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.reshape(()) & _WORD
        return torch.full((), value & _WORD, dtype=torch.int64, device=device)

    block = torch.arange(-(-size // 4), dtype=torch.int64, device=device)
    sample = torch.arange(n, dtype=torch.int64, device=device)[:, None] + word(first_sample)
    words = philox4x32((block, word(draw), word(seed >> 32), word(0)), (word(seed), sample & _WORD))
    u = [(2.0 * (r >> 9).double() + 1.0) * 2.0**-24 for r in words]
    pairs = [(torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2) for u1, u2 in ((u[0], u[1]), (u[2], u[3]))]
    z = torch.stack([radius * f(angle) for radius, angle in pairs for f in (torch.cos, torch.sin)], dim=-1)
    return z.flatten(1)[:, :size].float().reshape(*shape)

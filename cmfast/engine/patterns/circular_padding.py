"""Circular padding, as networks for tileable textures have it, becomes concatenations.

torch writes it in place to memory of its own, which a capture does not see through.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def recognise(function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a call of torch.nn.functional.pad in circular mode; None for any other call.

    Nor is one recognised that pads by more than there is, which torch refuses or leaves undefined.
    It is recognised as the network calls it, or as torch.compile has recorded that.
    """
    if function is not F.pad and function is not torch._C._nn.pad:
        return None
    given = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    x, pad = given["input"], given["pad"]
    if given.get("mode") != "circular" or len(pad) % 2 or len(pad) != 2 * (x.ndim - 2):
        return None
    pairs = [*zip(pad[::2], pad[1::2], strict=True)]  # from the last dimension on
    sizes = [x.shape[-1 - i] + sum(min(side, 0) for side in pair) for i, pair in enumerate(pairs)]
    if any(max(pair) > size or size < 0 for pair, size in zip(pairs, sizes, strict=True)):
        return None
    for i, pair in enumerate(pairs):
        x = _padded(x, x.ndim - 1 - i, pair)
    return x.clone() if x is given["input"] else x


def _padded(x: Tensor, dim: int, sides: Sequence[int]) -> Tensor:
    """Padded along one dimension by what lies at its other end; sides that are negative are cut off before."""
    before, after = sides
    begin, end = max(-before, 0), x.shape[dim] - max(-after, 0)
    if (begin, end) != (0, x.shape[dim]):
        x = x.narrow(dim, begin, end - begin)
    parts = [x.narrow(dim, x.shape[dim] - before, before)] if before > 0 else []
    parts += [x, x.narrow(dim, 0, after)] if after > 0 else [x]
    return torch.cat(parts, dim) if len(parts) > 1 else x

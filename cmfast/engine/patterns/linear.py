"""Linear layers of tokens [N, T, C] become linear layers of rows [N · T, C], which are products of two matrices."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def recognise(function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a call of torch.nn.functional.linear by rows; None for any other call, and for rows.

    It is recognised as the network calls it: torch takes some of them apart into batched products.
    """
    if function is not F.linear:
        return None
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    x, weight = given["input"], given["weight"]
    if x.ndim in (0, 2) or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return None
    rows = F.linear(x.reshape(-1, x.shape[-1]), weight, given.get("bias"))
    return rows.view(*x.shape[:-1], weight.shape[0])

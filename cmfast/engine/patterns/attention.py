"""torch's scaled dot-product attention becomes `cmfast.kernels.attention`, where it has neither mask nor dropout."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import attention


def recognise(function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a call of scaled_dot_product_attention by cmfast's operator; None for any other call.

    It is recognised as the network calls it: on tensors without data torch takes it apart into products and a softmax.
    """
    if function is not F.scaled_dot_product_attention:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (given[name] for name in names[:3])
    others = given.get("attn_mask"), given.get("dropout_p"), given.get("is_causal"), given.get("enable_gqa")
    if any(isinstance(other, Tensor) or other not in (None, False, 0.0) for other in others):
        return None
    if min(q.ndim, k.ndim, v.ndim) < 2 or k.shape[-2:] != v.shape[-2:] or q.shape[-1] != k.shape[-1]:
        return None
    if not k.shape[-2] or {q.dtype, k.dtype, v.dtype} != {torch.float32}:
        return None
    try:
        heads = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    except RuntimeError:  # torch says it in its own words
        return None
    result = attention(*(_of_heads(x, heads) for x in (q, k, v)), scale=given.get("scale"))
    return result if len(heads) == 2 else result.reshape(*heads, *q.shape[-2:])


def _of_heads(x: Tensor, heads: torch.Size) -> Tensor:
    """As [N, H, T, D], what has the dimensions `heads` in the place of N and H, or can be expanded to them."""
    x = x if x.shape[:-2] == heads else x.expand(*heads, *x.shape[-2:])
    return x if len(heads) == 2 else x.reshape(-1, heads[-1] if len(heads) > 2 else 1, *x.shape[-2:])

"""torch's scaled dot-product attention becomes `cmfast.kernels.attention`, where it has neither mask nor dropout."""

from typing import Any

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
    same = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and k.shape[2] > 0
    others = given.get("attn_mask"), given.get("dropout_p"), given.get("is_causal"), given.get("enable_gqa")
    if any(other not in (None, False, 0.0) for other in others if not isinstance(other, Tensor)):
        return None
    if not same or isinstance(others[0], Tensor) or q.shape[3] != k.shape[3] or not q.is_floating_point():
        return None
    return attention(q, k, v, scale=given.get("scale"))

"""Which dtypes the values of a graph have on a target that holds images in a dtype of its own.

The graph is captured in float32. Kernels hold their images, and the tokens that are made of them, in the target's
dtype. Rows (one position a sample: embeddings, gains) and what torch computes have the dtype that torch's type
promotion gives, with one exception: neither a parameter nor a row widens an image that it is broadcast to.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .graph import PERMUTE, VIEW, arguments
from .layouts import READERS

_ATTENTION = torch.ops.cmfast.attention.default


def of_input(node: fx.Node, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which an input of the graph is held: that of images where kernels alone read it, as an image."""
    like: Tensor = node.meta["val"]
    if dtype is not None and like.dtype == torch.float32 and like.ndim > 2 and _is_read_as_image(node):
        return dtype
    return like.dtype


def _is_read_as_image(node: fx.Node) -> bool:
    def reads(user: fx.Node) -> bool:
        if user.target in (VIEW, PERMUTE):
            return _is_read_as_image(user)
        return any(arguments(user)[name] is node for name in READERS.get(user.target, ()))

    return len(node.users) > 0 and all(map(reads, node.users))


def of_images(node: fx.Node, read: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype | None:
    """The one dtype in which an operator reads its images; None where they stay as they are."""
    if dtype is None or not read or any(x.dtype not in (torch.float32, dtype) for x in read):
        return None
    results = node.meta["val"]
    out = results if isinstance(results, Tensor) else results[0]
    if any(math.prod(x.shape[2:]) > 1 for x in (*read, out)):
        return dtype
    return functools.reduce(torch.promote_types, (x.dtype for x in read))


@dataclasses.dataclass(frozen=True)
class Converted:
    """An operator whose floating-point arguments are converted to one dtype first."""

    target: Any
    dtype: torch.dtype

    def __call__(self, /, **arguments: Any) -> Any:
        """The operator's results."""
        return self.target(**_converted(arguments, self.dtype))


def agree(
    computed: Any, target: Any, given: dict[str, Any], dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any], torch.dtype | None]:
    """What computes a call whose arguments are float32 and `dtype`, its arguments, and the dtype of its results.

    `computed` computes the operator `target`. The dtype of the results is None where it is what the call gives.
    """
    tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.dtype in (torch.float32, dtype)]
    values = [t for t in tensors if t.is_meta]
    if dtype in (None, torch.float32) or not any(t.dtype == dtype for t in values) or _takes_both(target):
        return computed, given, None
    narrow = all(t.dtype == dtype for t in values)
    if torch.Tag.pointwise not in getattr(target, "tags", ()):
        if narrow and (target in _NARROW or _is_view(target)):
            return computed, _converted(given, dtype), None
        return Converted(computed, torch.float32), given, None
    size = max(t.numel() for t in values)
    images = [t for t in values if t.numel() == size]
    result = dtype if all(t.dtype == dtype for t in images) else None
    try:
        out = computed(**pytree.tree_map_only(Tensor, lambda t: t.to("meta"), given))
    except RuntimeError:  # an operator that does not promote
        return Converted(computed, torch.float32), given, result
    return computed, given, result if out.dtype == torch.float32 else None


_aten = torch.ops.aten
#: Operators that torch has in bfloat16 and float16 as well, on every device. Others compute in float32: linear algebra,
#: transforms, and whatever else it may lack.
_NARROW = (
    _ATTENTION,
    *(_aten.convolution.default, _aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
    *(_aten._softmax.default, _aten.cat.default, _aten.stack.default, _aten.clone.default, _aten._to_copy.default),
    *(_aten.constant_pad_nd.default, _aten.reflection_pad2d.default, _aten.replication_pad2d.default),
    *(_aten.avg_pool2d.default, _aten.max_pool2d_with_indices.default, _aten._adaptive_avg_pool2d.default),
    *(_aten.upsample_nearest2d.default, _aten.upsample_nearest2d.vec, _aten.upsample_bilinear2d.default),
    *(_aten.mean.default, _aten.mean.dim, _aten.sum.default, _aten.sum.dim_IntList, _aten.reshape.default),
    *(_aten.native_group_norm.default, _aten.native_layer_norm.default, _aten.embedding.default),
    *(_aten.index.Tensor, _aten.index_select.default, _aten.repeat.default, _aten.flip.default, _aten.roll.default),
    *(_aten.pixel_shuffle.default, _aten.pixel_unshuffle.default, _aten.slice_scatter.default),
)
#: Views that read memory as elements of another dtype.
_REINTERPRETED = (_aten.view.dtype, _aten.view_as_complex.default, _aten.view_as_real.default)


def _is_view(target: Any) -> bool:
    return getattr(target, "is_view", False) and target not in _REINTERPRETED


def _takes_both(target: Any) -> bool:
    """Whether an operator takes rows of another dtype than its images'."""
    return getattr(target, "namespace", "") == "cmfast" and target is not _ATTENTION


def _converted(given: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    def convert(t: Tensor) -> Tensor:
        return t.to(dtype) if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t

    converted: dict[str, Any] = pytree.tree_map_only(Tensor, convert, given)
    return converted

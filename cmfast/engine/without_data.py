"""What operators give of tensors without data: shapes, dtypes and strides.

torch knows them all, but finds many by functions of Python that import its compiler: two seconds, in a process that may
have no other need of it. Here are the operators that nearly every network has.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)`, where no tensor has data but single numbers may have.

    Raises:
        Exception: what the operator raises for such arguments.
    """
    result = None
    if func in _COUNTS and kwargs.get("device") == torch.device("meta"):
        result = like(func(*args, **{**kwargs, "device": torch.device("cpu")}))
    elif isinstance(func, torch._ops.OpOverload) and not any(isinstance(v, _PLACES) for v in kwargs.values()):
        if torch.Tag.pointwise in func.tags:
            result = _pointwise(func, args, kwargs)
        elif func in _FUNCTIONS:
            names = [a.name for a in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            result = _FUNCTIONS[func](*(given[name] for name in names if name in given))
    return func(*args, **kwargs) if result is None else result


def like(tensor: Tensor) -> Tensor:
    """A tensor without data of the same shape, dtype and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like(tensor, dtype=dtype, device="meta")`."""
    formats = (torch.contiguous_format, *([torch.channels_last] if tensor.ndim == 4 else []))
    strided = tensor.layout == torch.strided
    if strided and any(tensor.is_contiguous(memory_format=format_) for format_ in formats):  # then it keeps its strides
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="meta")
    return torch.empty_like(tensor, dtype=dtype, device="meta")


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`, without data where one of them has none."""
    if any(t.is_meta for t in tensors):
        result: Tensor = call(torch.ops.aten.cat.default, [list(map(like, tensors))], {})
        return result
    return torch.cat(list(tensors))


_COUNTS = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)
#: Arguments that ask for a result of another kind.
_PLACES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _pointwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    if func._schema.is_mutable or len(func._schema.returns) != 1 or func.is_view:
        return None
    if not isinstance(func._schema.returns[0].type, torch.TensorType):  # such as whether two are equal
        return None
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    shape = _broadcast([t.shape for t in tensors])
    if shape is None or not any(t.is_meta for t in tensors):
        return None
    strides = _strides([t for t in tensors if t.ndim], shape)
    if strides is None:
        return None
    args, kwargs = pytree.tree_map_only(Tensor, _sample, (args, kwargs))
    return torch.empty_strided(shape, strides, dtype=func(*args, **kwargs).dtype, device="meta")


def _concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    ndim = tensors[0].ndim if tensors else 0
    if not ndim or not all(t.ndim == ndim and _is_plain(t) for t in tensors):
        return None
    if not -ndim <= dim < ndim:
        return None
    rest = {t.shape[: dim % ndim] + t.shape[dim % ndim + 1 :] for t in tensors}
    if len(rest) > 1 or any(t.shape == (0,) for t in tensors):
        return None
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return torch.empty(shape, dtype=torch.cat([*map(_sample, tensors)]).dtype, device="meta")


def _product(dims: int, a: Tensor, b: Tensor) -> Tensor | None:
    if not a.is_meta or not a.ndim == b.ndim == dims or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        return None
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected factors of a product to have the same dtype, got {a.dtype} and {b.dtype}")
    return a.new_empty([*a.shape[:-1], b.shape[-1]])


def _product_added(dims: int, to: Tensor, a: Tensor, b: Tensor, *factors: float) -> Tensor | None:
    result = _product(dims, a, b)
    fits = result is not None and to.dtype == result.dtype and _broadcast([to.shape, result.shape]) == [*result.shape]
    return result if fits else None


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    dims = x.ndim - 2
    if transposed or not (_is_plain(x) and _is_plain(weight)) or x.dtype != weight.dtype:
        return None
    if weight.ndim != x.ndim or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return None
    s, p, d = (list(given) * dims if len(given) == 1 else list(given) for given in (stride, padding, dilation))
    if not len(s) == len(p) == len(d) == dims or min(s + d) < 1:
        return None
    sizes = [(x.shape[i + 2] + 2 * p[i] - d[i] * (weight.shape[i + 2] - 1) - 1) // s[i] + 1 for i in range(dims)]
    return x.new_empty([x.shape[0], weight.shape[0], *sizes]) if min(sizes, default=1) > 0 else None


def _pooled(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Tensor | None:
    if others or not _is_plain(x) or x.ndim not in (3, 4) or len(kernel_size) != 2 or len(stride) not in (0, 2):
        return None
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[-2:], kernel_size, stride or kernel_size, strict=True)]
    return x.new_empty([*x.shape[:-2], *sizes]) if min(sizes) > 0 else None


def _upsampled(x: Tensor, output_size: Sequence[int], *scales: float | None) -> Tensor | None:
    fits = _is_plain(x) and x.ndim == 4 and len(output_size) == 2
    return x.new_empty([*x.shape[:2], *output_size]) if fits and min(output_size) > 0 else None


def _embedded(weight: Tensor, indices: Tensor, *others: Any) -> Tensor | None:
    fits = weight.is_meta and weight.ndim == 2 and indices.dtype in (torch.int64, torch.int32)
    return weight.new_empty([*indices.shape, weight.shape[1]]) if fits else None


def _sample(tensor: Tensor) -> Tensor:
    """A tensor of the same dtype that says as much of what an operator's dtype is, and has next to no elements."""
    return torch.ones([0] * tensor.ndim, dtype=tensor.dtype, device="cpu")


def _broadcast(shapes: Sequence[torch.Size]) -> list[int] | None:
    """The shape that they have together; None where they do not fit, which torch says in its own words."""
    ndim = max(map(len, shapes), default=0)
    padded = [(1,) * (ndim - len(shape)) + tuple(shape) for shape in shapes]
    found = [{n for n in sizes if n != 1} for sizes in zip(*padded, strict=True)]
    return None if any(len(sizes) > 1 for sizes in found) else [next(iter(sizes), 1) for sizes in found]


def _strides(tensors: Sequence[Tensor], shape: list[int]) -> Sequence[int] | None:
    """Those of the result, where all tensors are contiguous, or all lie channels-last and are as large as it is."""
    if all(t.stride() == _contiguous(t.shape) for t in tensors):
        return _contiguous(shape)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if layout is None:
        return None
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return strides if all(list(t.shape) == shape and t.stride() == strides for t in tensors) else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has no data, and would be contiguous."""
    return tensor.is_meta and tensor.stride() == _contiguous(tensor.shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[d + 1 :]) for d in range(len(shape)))


_FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten.cat.default: _concatenated,
    torch.ops.aten.convolution.default: _convolved,
    torch.ops.aten.avg_pool2d.default: _pooled,
    torch.ops.aten.upsample_nearest2d.default: _upsampled,
    torch.ops.aten.embedding.default: _embedded,
    torch.ops.aten.mm.default: functools.partial(_product, 2),
    torch.ops.aten.bmm.default: functools.partial(_product, 3),
    torch.ops.aten.addmm.default: functools.partial(_product_added, 2),
    torch.ops.aten.baddbmm.default: functools.partial(_product_added, 3),
}

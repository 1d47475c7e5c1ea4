"""The operators' calls (`cmfast.kernels.shapes`) with values, and what they move at least."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels import reference
from ..kernels.shapes import Call


def name(call: Call) -> str:
    """What tells the call from the others."""
    return " ".join(part for part in (call.op, call.shape, call.layout, call.form, call.dtype) if part)


def fields(call: Call) -> dict[str, str]:
    """The same as columns of a row."""
    return {key: getattr(call, key) for key in ("op", "shape", "layout", "form", "dtype")}


def values(call: Call, device: str, seed: int = 0) -> tuple[Any, ...]:
    """The call's arguments with normal values; what a backward gets of its forward is the definition's.

    Weights of a convolution are normal by the square root of its inputs, and not packed: `serving.prepared` packs them
    for a backend. Moments are those of normal values, where the call has none to take them of.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def real(tensor: Tensor) -> Tensor:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        numbers = torch.randn(size, generator=generator, device=device).to(tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    arguments = call.arguments
    if call.op == "conv2d":
        arguments = (arguments[0]._replace(packed=None),)
    found = pytree.tree_map_only(Tensor, real, arguments)
    if call.op == "group_norm_backward":
        _, h, skip, groups, weight, bias, add, scale, shift, silu, *_ = found
        found = (*found[:10], *reference.group_norm(h, skip, groups, weight, bias, 1e-5, add, scale, shift, silu)[1:])
    if call.op == "attention_backward":
        grad, q, k, v, _, _, factor = found
        found = (grad, q, k, v, *reference.attention(q, k, v, factor), factor)
    if call.op == "conv2d":
        (a,) = found
        found = (a._replace(weight=a.weight / a.weight[0].numel() ** 0.5),)
    if call.op == "apply_group_norm":
        h, skip, *_ = found
        found = (h, skip, *(None if x is None else reference.channel_moments(x) for x in (h, skip)), *found[4:])
    if call.op == "timestep_embedding":
        found[0].mul_(300)
    if call.op == "fold_group_norm":
        for moments in tensors(found[:2]):
            moments[:, 1].square_().add_(0.5).mul_(found[2])
    return found


def copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in memory of their own, in the same order."""

    def copy(tensor: Tensor) -> Tensor:
        whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).clone()
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return pytree.tree_map_only(Tensor, copy, given)


def tensors(given: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]


def bytes_moved(call: Call, given: tuple[Any, ...]) -> int:
    """The fewest bytes: each input is read once (of weights, the packed ones), each output written once."""
    if call.op == "conv2d" and given[0].packed is not None:
        given = (given[0]._replace(packed=None),)
    meta = tensors(getattr(reference, call.op)(*call.arguments)) if call.op != "consistency_step" else None
    if meta is None:  # its noise is drawn with a device's generator: the outputs are like the first input
        x, wanted = call.arguments[0], 1 + sum(call.arguments[-2:])
        return (2 + wanted) * x.numel() * x.element_size()
    return sum(t.numel() * t.element_size() for t in (*tensors(given), *meta))

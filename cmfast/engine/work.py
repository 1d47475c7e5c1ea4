"""The work of operators: the operations of their products, and the bytes that they read and write.

Operations are what `torch.utils.flop_counter.FlopCounterMode` counts: the multiplications and additions of products
(convolutions, linear layers, attention), each as one, and nothing for operators of elements, whose time is that of
their bytes. Convolutions are counted directly, as their definition has them, also where Winograd's algorithm does up
to four times fewer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..kernels.conv_arguments import ConvArguments
from .graph import value
from .steps import Step, Steps

_aten = torch.ops.aten

#: The operators of steps in which torch multiplies matrices or convolves.
PRODUCTS = ("aten.convolution", "aten.mm", "aten.addmm")
#: Operators that read as much of a table as they write, not all of it.
_GATHERS = (
    _aten.embedding.default,
    _aten.gather.default,
    _aten.index.Tensor,
    _aten.index_select.default,
)


def of_convolution(out: Sequence[int], weight: Sequence[int]) -> int:
    """The operations of a convolution with weights [Cout, Cin, *kernel], by the shapes of its output and of these."""
    return 2 * math.prod(out) * math.prod(weight[1:])


def _conv2d(h: Any, skip: Any, weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return of_convolution(out_shape[0], weight)


def _attention(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * math.prod(q) * k[2]


#: The formulas of cmfast's products, and of one of torch's that FlopCounterMode has none for, as its `custom_mapping`
#: takes them.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.cmfast.conv2d: _conv2d,
    torch.ops.cmfast.attention: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def operations(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """The operations of a call of an operator; tensors may be without data."""
    from torch.utils.flop_counter import flop_registry, shape_wrapper  # it imports triton, where there is one

    packet = getattr(target, "overloadpacket", None)
    formula = shape_wrapper(FORMULAS[packet]) if packet in FORMULAS else flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def operations_of(steps: Sequence[Step]) -> list[int]:
    """The operations of each step; of several that make a node's value, the one that multiplies, or else the last."""
    working = {step.node: i for i, step in enumerate(steps)}
    working |= {step.node: i for i, step in enumerate(steps) if step.operator in PRODUCTS}
    return [_of_node(step.node) if working[step.node] == i else 0 for i, step in enumerate(steps)]


def _of_node(node: fx.Node | None) -> int:
    if node is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    return operations(node.target, args, kwargs, value(node))


def bytes_of(steps: Steps, index: int) -> tuple[int, int]:
    """What a step reads and writes, each tensor once, but what stays within it both written and read; and that alone.

    Of weights that were packed, the packed ones are read.
    """
    step = steps.steps[index]
    target = None if step.node is None else step.node.target
    read: list[Tensor] = []
    written: list[Tensor] = []
    inside: list[Tensor] = []
    for t in tensors_of(step.arguments):
        buffer = steps.buffer(t) if t.is_meta else None
        written_here = buffer is not None and buffer.first == index
        stays = buffer is not None and buffer.last == index
        (inside if written_here and stays else written if written_here else read).append(t)
    scratch = 2 * sum(map(_size, inside))
    return _moved(target, read, written) + scratch, scratch


def bytes_of_call(target: Any, arguments: Any, result: Any) -> int:
    """What a call of an operator reads and writes, each tensor once; nothing, where the result is a view."""
    if getattr(target, "is_view", False):
        return 0
    if target is torch.ops.cmfast.conv2d.default and not isinstance(arguments, ConvArguments):
        positional, named = arguments
        of_kernel = {name: given for name, given in named.items() if name in ConvArguments._fields}
        arguments = ConvArguments(*positional[: len(ConvArguments._fields)], **of_kernel)  # packed weights are read
    written = tensors_of(result)
    return _moved(target, [t for t in tensors_of(arguments) if all(t is not out for out in written)], written)


def _moved(target: Any, read: Iterable[Tensor], written: Iterable[Tensor]) -> int:
    out = sum(map(_size, written))
    return out + sum(min(_size(t), out) if target in _GATHERS else _size(t) for t in read)


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, each once.

    Of a convolution with packed weights, the others, of which only the shape is read, are not among them.
    """
    found: dict[int, Tensor] = {}
    for leaf in pytree.tree_leaves(values, is_leaf=lambda x: isinstance(x, ConvArguments)):
        if isinstance(leaf, ConvArguments):
            given = tensors_of(list(leaf if leaf.packed is None else leaf._replace(weight=None)))
            found |= {id(t): t for t in given}
        elif isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
    return list(found.values())


def _size(t: Tensor) -> int:
    """Bytes of a tensor's elements: those of a value that is expanded lie in memory once."""
    once = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or not t.is_meta)
    return math.prod(once) * t.element_size()


def products_of(arguments: Any) -> torch.dtype | None:
    """The dtype of products: what the arguments name, or else that of the first floating-point tensor among them."""
    leaves = pytree.tree_leaves(arguments)
    named = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    floating = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return next(iter(named + floating), None)

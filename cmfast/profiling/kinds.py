"""How operators are named in tables: with what their time depends on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.graph import CONV, arguments, shape
from ..engine.steps import Step
from ..kernels.conv_forms import ConvForm


def name_of(target: Any) -> str:
    """An operator's name, such as aten.silu."""
    return str(target).removesuffix(".default")


def kind_of_step(step: Step) -> str:
    """The operator of a step; of a convolution with its kernel, its outputs' size and its form."""
    if step.node is not None and step.node.target is CONV and step.operator.startswith("conv2d"):
        a = arguments(step.node)
        form = ConvForm(a["tile"], a["transformed"], a["dtype"])
        return f"conv {_convolution(shape(a['weight']), step.node.meta['val'][0].shape)}, {form}"
    return f"{step.operator} (torch)" if step.reason else step.operator


def kind_of_call(target: Any, args: Sequence[Any], result: Any) -> str:
    """The operator of a call of torch's; of a convolution with its kernel and its outputs' size."""
    if target is torch.ops.aten.convolution.default and isinstance(result, Tensor):
        return f"{name_of(target)} {_convolution(args[1].shape, result.shape)}"
    return name_of(target)


def _convolution(weight: Sequence[int], out: Sequence[int]) -> str:
    return f"{'x'.join(map(str, weight[2:]))} at {' x '.join(map(str, out[2:]))}"

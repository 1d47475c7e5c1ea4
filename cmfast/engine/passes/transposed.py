"""A transposed convolution is a convolution with an output for each of its strides' phases, and a pixel shuffle.

With o + p = s·q + r (output position, padding, stride, quotient, phase):

    y[o] = Σ_j x[q − j] · w[s·j + r]

Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?", section 3.
"""

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph import Graph, arguments, shape

_aten = torch.ops.aten


def rewrite(graph: Graph) -> int:
    """Replace transposed convolutions of images whose two strides are the same."""
    return sum(_rewrite(graph, node) for node in graph.calls(_aten.convolution.default))


def _rewrite(graph: Graph, node: fx.Node) -> bool:
    a = arguments(node)
    weight, bias = graph.tensor(a["weight"]), graph.tensor(a["bias"])
    if weight is None or not a["transposed"] or weight.ndim != 4 or a["groups"] != 1 or set(a["dilation"]) != {1}:
        return False
    if len(set(a["stride"])) != 1 or (bias is None) != (a["bias"] is None):
        return False
    stride = a["stride"][0]
    taps = [-(-size // stride) for size in weight.shape[2:]]
    ends = [p + o for p, o in zip(a["padding"], shape(node)[2:], strict=True)]
    whole = [stride * (size + count - 1) for size, count in zip(shape(a["input"])[2:], taps, strict=True)]
    if any(end > size for end, size in zip(ends, whole, strict=True)):
        return False  # an output padding that no input reaches
    phases = graph.attribute(f"phases {stride} of {a['weight'].target}", _phases(weight, stride, taps), node)
    if bias is not None:
        name = f"phases {stride} of {a['bias'].target}"
        bias_node = graph.attribute(name, bias.repeat_interleave(stride**2), node)
    padding = [count - 1 for count in taps]
    plain = ([1, 1], padding, [1, 1], False, [0, 0], 1)
    args = (a["input"], phases, None if bias is None else bias_node, *plain)
    out = graph.call(node, _aten.pixel_shuffle.default, graph.call(node, _aten.convolution.default, *args), stride)
    for d, (begin, end) in enumerate(zip(a["padding"], ends, strict=True)):
        out = graph.call(node, _aten.slice.Tensor, out, 2 + d, begin, end)
    graph.replace(node, out)
    return True


def _phases(weight: Tensor, stride: int, taps: list[int]) -> Tensor:
    """[Cout · s², Cin, J, J'] of the weights [Cin, Cout, k, k'] of a transposed convolution."""
    rows, columns = (stride * count - size for count, size in zip(taps, weight.shape[2:], strict=True))
    filled = F.pad(weight, (0, columns, 0, rows))
    apart = filled.reshape(*weight.shape[:2], taps[0], stride, taps[1], stride)
    kernels = apart.permute(1, 3, 5, 0, 2, 4).flip(4, 5)
    return kernels.reshape(-1, weight.shape[0], *taps)

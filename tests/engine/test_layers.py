"""Each call of a graph, and each step, knows the network's module that it is of."""

import re
import threading

import pytest
import torch
from torch import nn

from cmfast.engine import Accelerator
from cmfast.engine.capture import capture
from cmfast.engine.cuda.plan import plan
from cmfast.engine.graph import CONV, arguments, layer
from cmfast.engine.layers import Layers, Nesting, common
from cmfast.engine.passes import GPU_PASSES, PASSES

from .networks import network


@pytest.mark.parametrize("kind", ["film", "added", "strided", "video"])
@torch.no_grad()
def test_a_convolution_is_of_the_module_whose_weight_it_has(kind):
    unet, inputs = network(kind)
    graph = capture(unet, inputs)
    for rewrite in (*PASSES.values(), *GPU_PASSES.values()):
        rewrite(graph)
    modules, count = dict(unet.named_modules()), 0
    for node in graph.calls(CONV):
        name = str(arguments(node)["weight"].target)
        owners = [owner for owner in modules if owner and re.search(rf"(?<![\w.]){re.escape(owner)}\.weight\b", name)]
        assert owners
        assert layer(node) == common(owners)
        count += len(owners) == 1
    assert count > 10
    assert {layer(node) for node in graph.calls(torch.ops.cmfast.attention.default)} <= {
        name for name, module in modules.items() if type(module).__name__ == "AttentionBlock"
    }
    norms = graph.calls(torch.ops.cmfast.fold_group_norm.default, torch.ops.cmfast.apply_group_norm.default)
    assert {layer(node).split(".")[0] for node in norms} <= {"input_blocks", "middle_block", "output_blocks", ""}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, row):
        h = self.norm(x) * (1 + self.to_q(row)[:, :, None, None]) + self.to_k(row)[:, :, None, None]
        return (x + self.conv(nn.functional.silu(h))).tanh()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x, row):
        for block in self.blocks:
            x = block(x, row)
        return self.head(x.flatten(2).mT), row.tan()


@torch.no_grad()
def test_fused_steps_are_of_the_module_of_their_main_operator():
    net, inputs = Net().eval(), (torch.randn(1, 8, 4, 4), torch.randn(1, 8))
    expected = [
        ("conv2d", "blocks"),  # the linear layers of both blocks as one
        ("aten.tanh", "blocks.0"),
        ("conv2d", "blocks.0.conv"),
        ("fold_group_norm", "blocks.0.norm"),
        ("channel_norm", "head.0"),
        ("conv2d", "head.1"),
        ("aten.tan", ""),
    ]
    steps = Accelerator(net, torch.float32).executable(inputs).steps.steps
    found = {(step.operator, step.layer) for step in steps}
    assert found >= set(expected)
    assert {step.layer for step in steps if step.operator == "conv2d"} == {
        "blocks", "blocks.0.conv", "blocks.1.conv", "head.1"
    }  # fmt: skip
    launches = plan(net, inputs)
    assert {("apply_group_norm", "blocks.1.norm"), ("conv2d", "blocks.1.conv"), ("aten.tan", "")} <= {
        (launch.operator, launch.layer) for launch in launches
    }


def test_modules_without_a_name_have_that_of_their_caller_and_errors_do_not_matter():
    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("none")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.raises = nn.Identity(), Raises()

        def forward(self, x):
            found.append(layers.current)
            nn.Sequential(Noting())(self.inner(x))
            with pytest.raises(ValueError, match="none"):
                self.raises(x)
            found.append(layers.current)

    class Noting(nn.Module):
        def forward(self, x):
            found.append(layers.current)

    found, outer = [], Outer()
    layers = Layers({module: f"net.{name}" for name, module in outer.named_modules()})
    with layers.followed():
        outer(torch.ones(1))
        assert layers.current == ""
        thread = threading.Thread(target=outer.inner, args=(torch.ones(1),))
        thread.start()
        thread.join()
    assert found == ["net."] * 3
    assert not nn.modules.module._has_any_global_hook()


def test_ranges_nest_as_the_names_do():
    found = []
    nesting = Nesting(found.append, lambda: found.append("end"))
    for name in ("a.b.c", "a.b.d", "a.b.d", "ab", ""):
        nesting.enter(name)
    assert found == ["a", "a.b", "a.b.c", "end", "a.b.d", "end", "end", "end", "ab", "end"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(["a.b.c"], "a.b.c"), (["a.b.c", "a.b.d"], "a.b"), (["a.b", "a.bc"], "a"), (["a", "b"], ""), (["a.b", "a"], "a")],
)
def test_the_module_that_several_are_in(layers, expected):
    assert common(layers) == expected

import pytest
import torch
from torch import nn

from cmfast.engine import Accelerator, capture
from cmfast.engine.graph import CONV, arguments, change
from cmfast.engine.passes import GPU_PASSES, PASSES

from .networks import KINDS, error, exact, network

ALL = PASSES | GPU_PASSES


def run_until(graph, last):
    for name, rewrite in ALL.items():
        count = rewrite(graph)
        if name == last:
            return count
    raise AssertionError(last)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_changes_no_result(kind):
    unet, inputs = network(kind)
    expected = exact(unet, inputs)
    allowed = 2 * error(unet(*inputs), expected) + 1e-6
    graph = capture(unet, inputs)
    for name, rewrite in ALL.items():
        rewrite(graph)
        graph.nodes.lint()
        assert error(graph.run(*inputs), expected) < allowed, name


@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_a_pass_can_be_left_out(name):
    unet, inputs = network("film")
    fast = Accelerator(unet, torch.float32, passes=[other for other in PASSES if other != name])
    assert error(fast(*inputs), exact(unet, inputs)) < 1e-5
    assert fast.executable(inputs).rewrites.keys() == PASSES.keys() - {name}


@pytest.mark.parametrize("name", ALL)
def test_a_pass_finds_nothing_twice(name):
    unet, inputs = network("three-levels")
    graph = capture(unet, inputs)
    # It is written in cmfast's operators, on images.
    others = ("tokens", "transposed", "padding", "outputs", "gates", "scaling")
    found = name == "timestep_embedding pattern" or not (name.endswith("pattern") or name in others)
    assert (run_until(graph, name) > 0) == found
    assert ALL[name](graph) == 0


def remaining(kind, passes=PASSES):
    """The names of the operators that are left after all passes, and the conv2d calls' arguments."""
    unet, inputs = network(kind)
    graph = capture(unet, inputs)
    for rewrite in passes.values():
        rewrite(graph)
    calls = [node for node in graph.nodes.nodes if node.op == "call_function"]
    return {str(node.target).removesuffix(".default") for node in calls}, [arguments(n) for n in graph.calls(CONV)]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_network_is_left_apart(kind):
    operators, convolutions = remaining(kind)
    for fused in ("aten.convolution", "aten.addmm", "aten.silu", "cmfast.group_norm", "aten.add.Tensor"):
        assert fused not in operators
    if kind != "pooled":  # whose resampling has no convolution after it
        assert not any("upsample" in name or "pool" in name for name in operators)
    assert operators >= {"cmfast.conv2d", "cmfast.attention", "cmfast.fold_group_norm"}
    assert "cmfast.channel_moments" not in operators or kind in ("pooled",)
    assert any(a["skip"] is not None for a in convolutions)
    assert any(a["residual"] is not None for a in convolutions)


def test_residuals_are_resampled_with_the_block():
    _, convolutions = remaining("film")
    assert sorted(str(a["residual_resample"]) for a in convolutions if a["residual_resample"]) == ["average", "nearest"]
    assert sorted(str(a["resample"]) for a in convolutions if a["resample"]) == ["average", "nearest"]


def test_the_embedding_is_projected_once():
    _, convolutions = remaining("film")
    linear = [a for a in convolutions if list(a["h"].meta["val"].shape[2:]) == [1, 1]]
    assert len(linear) == 3  # two of the time's embedding, and all blocks' together
    assert all(a["silu"] for a in linear[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_on_gpus_norms_are_written_for_kernels_of_several_taps(kind):
    operators, convolutions = remaining(kind, ALL)
    assert operators >= {"cmfast.apply_group_norm", "cmfast.fold_group_norm"}  # attention reads the latter's
    for a in convolutions:
        if list(a["weight"].meta["val"].shape[2:]).count(1) < a["weight"].meta["val"].ndim - 2:
            assert a["gain"] is a["skip"] is None
            assert not a["silu"]
            assert a["resample"] in (None, "nearest")
        else:
            assert a["resample"] is None
    before = remaining(kind)[1]
    assert [a["resample"] for a in convolutions].count("nearest") == [a["resample"] for a in before].count("nearest")


class TwoReaders(nn.Module):
    """A norm that convolutions of one and of several taps read, with and without pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.a, self.b = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.one = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.norm(self.first(x))
        return self.a(y) + self.b(y) * self.one(y)


@torch.no_grad()
def test_a_written_norm_is_shared():
    torch.manual_seed(0)
    net, x = TwoReaders().eval(), torch.randn(2, 3, 6, 6)
    graph = capture(net, [x])
    for rewrite in PASSES.values():
        rewrite(graph)
    (fold,) = graph.calls(torch.ops.cmfast.fold_group_norm.default)
    assert GPU_PASSES["written_norms"](graph) == 2
    (norm,) = graph.calls(torch.ops.cmfast.apply_group_norm.default)
    assert sum(arguments(conv)["h"] is norm for conv in graph.calls(CONV)) == 2
    assert sum(arguments(conv)["gain"] is not None for conv in graph.calls(CONV)) == 1
    assert list(graph.calls(fold.target)) == [fold]
    torch.testing.assert_close(graph.run(x), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_gain_of_anything_else_stays():
    torch.manual_seed(0)
    net, x = TwoReaders().eval(), torch.randn(2, 3, 6, 6)
    graph = capture(net, [x])
    for rewrite in PASSES.values():
        rewrite(graph)
    conv = next(conv for conv in graph.calls(CONV) if arguments(conv)["gain"] is not None)
    a = arguments(conv)
    doubled = graph.call(conv, torch.ops.aten.mul.Tensor, a["gain"], 2)
    change(conv, gain=doubled)
    assert GPU_PASSES["written_norms"](graph) == 1
    assert arguments(conv)["gain"] is doubled

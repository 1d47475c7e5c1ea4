import pytest
import torch

from cmfast.engine import Accelerator, capture
from cmfast.engine.graph import CONV, arguments
from cmfast.engine.passes import PASSES

from .networks import KINDS, error, exact, network


def run_until(graph, last):
    for name, rewrite in PASSES.items():
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
    for name, rewrite in PASSES.items():
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


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_finds_nothing_twice(name):
    unet, inputs = network("three-levels")
    graph = capture(unet, inputs)
    others = ("tokens", "transposed", "padding", "outputs", "gates")  # it is written in cmfast's operators, on images
    assert (run_until(graph, name) > 0) == (not name.endswith("pattern") and name not in others)
    assert PASSES[name](graph) == 0


def remaining(kind):
    """The names of the operators that are left after all passes, and the conv2d calls' arguments."""
    unet, inputs = network(kind)
    graph = capture(unet, inputs)
    for rewrite in PASSES.values():
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

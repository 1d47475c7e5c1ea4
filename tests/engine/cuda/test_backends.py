"""A backend that is asked for by name serves the same graph, or says what it cannot."""

import contextlib

import pytest
import torch
from cmfast.kernels import BackendError, native, use_backend
from torch import nn

import cmfast
from cmfast.engine.accelerator import accelerator_of
from cmfast.engine.cuda import measurements, operators, tuning
from cmfast.engine.cuda.launches import launch_of
from cmfast.engine.cuda.plan import plan

from ...kernels import emulation
from ..networks import error
from .device import DEVICE, ON_GPU
from .test_tuning import Clock

BF16 = torch.bfloat16


class Attend(nn.Module):
    """A norm, and attention with heads of some size."""

    def __init__(self, size=16):
        super().__init__()
        self.norm, self.size = nn.GroupNorm(2, 3 * size), size

    def forward(self, x):
        q, k, v = torch.exp(self.norm(x)).flatten(2).mT.unflatten(2, (3, 1, self.size)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def attend(size=16):
    torch.manual_seed(0)
    return Attend(size).eval().to(DEVICE), torch.randn(2, 3 * size, 3, 2, device=DEVICE)


@pytest.fixture
def _extension():
    """csrc/cuda, on a GPU or in the emulation."""
    if not ON_GPU and emulation.missing():
        pytest.skip(emulation.missing())
    with contextlib.nullcontext() if ON_GPU else native.stand_in(emulation.emulated()):
        yield


def served(fast, x):
    """What serves the norms and the attentions of an evaluation: backends."""
    steps = accelerator_of(fast).executable([x]).steps.steps
    own = [step for step in steps if step.operator.partition(" ")[0] in ("group_norm", "attention")]
    assert own
    assert all(step.reason == "" for step in own)
    return ["cuda" if launch_of(step) is None else "triton" for step in own]


@pytest.mark.usefixtures("_extension")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@torch.no_grad()
def test_both_serve_the_same_graph(dtype):
    net, x = attend()
    expected = net(x).double()
    outs = {}
    for backend in ("triton", "cuda", None):
        fast = cmfast.accelerate(net, dtype, backend=backend)
        outs[backend] = fast(x)
        assert error(outs[backend], expected) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert set(served(fast, x)) == {backend or "triton"}
    assert torch.equal(outs["triton"], outs[None])


@pytest.mark.usefixtures("_extension")
@torch.no_grad()
def test_the_choice_of_the_process_counts_at_each_call(monkeypatch):
    net, x = attend()
    fast = cmfast.accelerate(net)
    made = accelerator_of(fast)._made.programs
    first, again = fast(x), fast(x)
    with use_backend("cuda"):
        other = fast(x)
        assert set(served(fast, x)) == {"cuda"}
    monkeypatch.setenv("CMFAST_BACKEND", "triton")
    assert torch.equal(fast(x), first)
    monkeypatch.delenv("CMFAST_BACKEND")
    assert torch.equal(first, again)
    assert error(other, first.double()) < 1e-6
    assert len(made) == 3  # of the engine's choice, of cuda, of triton
    with use_backend("cuda"):
        named = cmfast.accelerate(net, backend="triton")
        named(x)
        assert set(served(named, x)) == {"triton"}


@pytest.mark.usefixtures("_extension")
@torch.no_grad()
def test_the_faster_is_taken_where_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_measured", {})
    net, x = attend()
    clock = Clock(monkeypatch, lambda name: {"cuda": 1e-6, "triton": 2e-6}[name])
    fast = cmfast.accelerate(net, BF16, tune=True, cache=tmp_path)
    assert error(fast(x), net(x).double()) < 1e-2
    assert set(served(fast, x)) == {"cuda"}
    assert sorted(clock.measured) == ["cuda", "cuda", "triton", "triton"]
    named = cmfast.accelerate(net, BF16, tune=True, backend="triton")
    assert set(served(named, x)) == {"triton"}
    (path,) = tmp_path.glob("*.json")
    found = measurements.read(path)
    assert sorted(call.partition(":")[0] for call in found.calls) == ["attention", "group_norm"]
    monkeypatch.setattr(measurements, "FOLDER", tmp_path / "package")
    measurements._shipped_files.cache_clear()
    assert [p.programs > 0 for p in plan(net, [x]) if p.operator in ("group_norm", "attention")] == [True, True]
    found.versions["card"] = "NVIDIA H100 80GB HBM3"
    found.write(measurements.FOLDER / "forms-h100.json")
    measurements._shipped_files.cache_clear()
    planned = plan(net, [x])
    assert [p.operator for p in planned if not p.programs and not p.reason] == ["group_norm", "attention"]
    measurements._shipped_files.cache_clear()


@pytest.mark.usefixtures("_extension")
@torch.no_grad()
def test_a_kernel_of_the_extension_that_errs_is_not_taken(monkeypatch, caplog):
    def launch(out, lse, *given):
        launched(out, lse, *given)
        lse.add_(0.1)

    launched = operators.launch_attention
    monkeypatch.setattr(operators, "launch_attention", launch)
    monkeypatch.setattr(tuning, "_measured", {})
    net, x = attend()
    Clock(monkeypatch, lambda name: {"cuda": 1e-6, "triton": 2e-6}[name])
    assert served(cmfast.accelerate(net, tune=True), x) == ["cuda", "triton"]
    assert "cuda is left out for attention" in caplog.text


@pytest.mark.usefixtures("_extension")
@torch.no_grad()
def test_what_a_backend_cannot_serve(monkeypatch):
    net, x = attend(8)
    fast = cmfast.accelerate(net)
    assert error(fast(x), net(x).double()) < 1e-6  # torch has the attention
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot serve attention: the head size is 8"):
            cmfast.accelerate(net, backend=backend)(x)
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve channel_norm: there is no CUDA kernel"):
        cmfast.accelerate(nn.LayerNorm(8).to(DEVICE), backend="cuda")(torch.ones(2, 3, 8, device=DEVICE))
    monkeypatch.setattr("cmfast.kernels.triton.available", lambda op, tensors: (op != "conv2d", "it rains"))
    net = nn.Linear(4, 4).to(DEVICE)
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(BackendError, match="backend 'triton' cannot serve conv2d: it rains"):
        cmfast.accelerate(net, backend="triton")(x)
    assert error(cmfast.accelerate(net)(x), net(x).double()) < 1e-6


@torch.no_grad()
def test_an_extension_that_is_not_there(monkeypatch):
    built = native._built
    missing = "the extension cmfast._cuda was not built: do so"
    monkeypatch.setattr(native, "_built", lambda name: missing if name == "_cuda" else built(name))
    net, x = attend()
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot serve group_norm: {missing}"):
        cmfast.accelerate(net, backend="cuda", keep_weights=False)(x)


@torch.no_grad()
def test_other_backends_are_refused():
    net, x = attend()
    fast = cmfast.accelerate(net)
    message = "backend '{}' cannot serve an accelerated network: on a GPU the engine has the kernels of cuda and triton"
    for backend in ("reference", "cpu"):
        with pytest.raises(BackendError, match=message.format(backend)):
            cmfast.accelerate(net, backend=backend)
        with use_backend(backend), pytest.raises(BackendError, match=message.format(backend)):
            fast(x)
    with pytest.raises(BackendError, match="unknown backend 'fast'"):
        cmfast.accelerate(net, backend="fast")


@torch.no_grad()
def test_parts_and_torch_compile_have_it_too():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attend(8)[0]

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    net, x = Loud().eval().to(DEVICE), attend(8)[1]
    with pytest.raises(BackendError, match="backend 'triton' cannot serve attention"):
        cmfast.accelerate(net, backend="triton")(x)
    torch._dynamo.reset()
    with use_backend("triton"), pytest.raises(BackendError, match="backend 'triton' cannot serve attention"):
        torch.compile(net.inner, backend="cmfast")(x)
    torch._dynamo.reset()


@pytest.mark.skipif(ON_GPU, reason="of the CPU's target")
@torch.no_grad()
def test_on_the_cpu_there_is_one(monkeypatch):
    monkeypatch.delenv("CMFAST_GPU_ON_CPU")
    net, x = attend()
    fast = cmfast.accelerate(net, backend="cpu")
    assert error(fast(x), net(x).double()) < 1e-6
    message = "on the CPU the engine has the kernels of cpu; ask for one of them"
    with pytest.raises(BackendError, match=message):
        cmfast.accelerate(net, backend="triton")
    with use_backend("reference"), pytest.raises(BackendError, match=message):
        cmfast.accelerate(net)(x)

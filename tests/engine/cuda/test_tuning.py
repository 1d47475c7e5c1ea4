"""Which form of a convolution is taken: by a clock, by what was measured before, and by the rule."""

import json
import logging

import pytest
import torch
from torch import nn

import cmfast
from cmfast.engine import work
from cmfast.engine.accelerator import accelerator_of
from cmfast.engine.cuda import cudnn, measurements, timing, tuning
from cmfast.engine.cuda.forms import Form
from cmfast.engine.cuda.launches import launch_of
from cmfast.engine.cuda.measurements import Measurements, describe, read
from cmfast.engine.cuda.plan import plan
from cmfast.engine.cuda.rule import Rule

from ..networks import error, exact
from .device import DEVICE, ON_GPU, network
from .stand_in import Cuda
from .test_convolutions import call, image, same

F32, BF16 = torch.float32, torch.bfloat16
CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch, tmp_path):
    """As in a new process, without files in the package."""
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(measurements, "FOLDER", tmp_path / "package")
    measurements._shipped_files.cache_clear()


class Clock:
    """A clock in the place of a GPU's: what takes which time, and what was measured."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.measured = seconds, []
        monkeypatch.setattr(tuning, "seconds", self)

    def __call__(self, runs, device):
        executable = getattr(runs[0], "__self__", None)
        if executable is None:  # a launch of nothing, a copy
            return 1e-6
        name = described(executable.steps.steps)
        self.measured.append(name)
        return self.seconds(name)


def described(steps):
    """ "torch", or the rows and columns of the tiles of a product; of any other operator the backend."""
    if any(step.operator in work.PRODUCTS for step in steps):
        return "torch"
    if not any(step.operator.startswith("conv2d") for step in steps):
        return "cuda" if launch_of(steps[0]) is None else "triton"
    constants = next(launch_of(s).constants for s in reversed(steps) if "BLOCK_M" in launch_of(s).constants)
    return constants["BLOCK_M"], constants["BLOCK_N"]


def favour(name):
    return lambda found: 1e-6 if found == name else 1e-3


def forms(fast, inputs):
    """The form of each convolution of an accelerated network."""
    by_node = {}
    for step in accelerator_of(fast).executable(inputs).steps.steps:
        if step.operator.startswith("conv2d") or step.operator in work.PRODUCTS:
            by_node.setdefault(step.name, []).append(step)
    return [described(steps) for steps in by_node.values()]


def small(batch=1):
    """A network of two convolutions, and its input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(2, 16), nn.SiLU(), nn.Conv2d(16, 8, 1)).eval()
    return net.to(DEVICE), [torch.randn(batch, 16, 6, 6, device=DEVICE)]


def test_the_fastest_by_the_clock_is_taken(monkeypatch):
    net, inputs = small()
    expected = exact(net, inputs)
    for name in ("torch", (64, 32)):
        monkeypatch.setattr(tuning, "_measured", {})
        clock = Clock(monkeypatch, favour(name))
        fast = cmfast.accelerate(net, BF16, tune=True)
        assert error(fast(*inputs), expected) < 2e-2
        assert set(clock.measured) > {"torch", (64, 32), (16, 16)}
        assert forms(fast, inputs) == [name, name]


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
    net, inputs = small()
    clock = Clock(monkeypatch, favour("torch"))
    out = cmfast.accelerate(net, tune=True, cache=tmp_path)(*inputs)
    count = len(clock.measured)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    fast = cmfast.accelerate(net, tune=True, cache=tmp_path)
    assert not fast(*inputs).equal(out)
    assert len(clock.measured) == count
    monkeypatch.setattr(tuning, "_measured", {})  # another process
    clock.seconds = favour((16, 16))
    fast = cmfast.accelerate(net, tune=True, cache=tmp_path)
    assert error(fast(*inputs), exact(net, inputs)) < 1e-5
    assert forms(fast, inputs) == ["torch", "torch"]
    assert len(clock.measured) == count
    fast(torch.cat((*inputs, *inputs)))  # others are measured, and kept beside the first
    assert len(clock.measured) > count
    (path,) = tmp_path.glob("*.json")
    assert path.name == measurements.file_name(measurements.card(DEVICE))
    kept = json.loads(path.read_text())
    assert kept["versions"] == measurements.versions(DEVICE)
    assert kept["launch_seconds"] > 0 < kept["bytes_per_second"]
    assert len(kept["calls"]) == 4
    for one in kept["calls"].values():
        assert one["dtype"] == "float32"
        assert one["seconds"]["torch"] in (1e-6, 1e-3)
        assert len(one["seconds"]) > 1


@pytest.mark.parametrize("fault", ["wrong", "failing"])
def test_a_form_that_is_no_good_is_left_out(monkeypatch, tmp_path, caplog, fault):
    def convolve(y, *_):
        if fault == "failing":
            raise RuntimeError("out of resource")
        y.copy_(convolved(y, *_) or y).mul_(1.01)

    convolved = cudnn._convolve
    monkeypatch.setattr(cudnn, "_convolve", convolve)
    net, inputs = small()
    Clock(monkeypatch, favour("torch"))
    with caplog.at_level(logging.INFO, logger="cmfast"):
        fast = cmfast.accelerate(net, tune=True, cache=tmp_path)
        assert error(fast(*inputs), exact(net, inputs)) < 1e-5
    first, second = forms(fast, inputs)
    assert first != "torch"
    assert second == "torch"  # of one tap: it is a matrix product
    (path,) = tmp_path.glob("*.json")
    times = [one["seconds"]["torch"] for one in json.loads(path.read_text())["calls"].values()]
    assert times == [None, 1e-6]
    (record,) = [r for r in caplog.records if "is left out" in r.getMessage()]
    assert ("it is off by 0.01, 0.0" if fault == "wrong" else "out of resource") in record.getMessage()
    assert record.levelno == (logging.WARNING if fault == "wrong" else logging.INFO)


@pytest.mark.parametrize("spoiled", [0, 1, 2, None])
def test_outputs_means_and_deviations_are_compared(spoiled):
    """On the scale of the values, which may all be alike."""
    a = call(image(2, 4, 4, 4), 8, 3, moments=True)
    for spread in (0, 1):
        y = 3 + spread * torch.randn(2, 8, 4, 4)
        exact = [y, torch.stack((y.mean((2, 3)), (y - y.mean((2, 3), keepdim=True)).square().sum((2, 3))), 1)]
        for value in (1.1, float("nan")):
            found = [t.clone() for t in exact]
            if spoiled == 0:
                found[0] *= value
            elif spoiled is not None:
                found[1][:, spoiled - 1] += 16 * (value - 1)
            off = tuning._differences(found, exact, a)
            assert [not x <= 1e-3 for x in off] == [i == spoiled for i in range(3)]


def test_memory_that_does_not_suffice_is_not_kept_as_a_fault(monkeypatch):
    def convolve(*_):
        raise torch.OutOfMemoryError("2 GB")

    net, inputs = small()
    clock = Clock(monkeypatch, favour("torch"))
    with monkeypatch.context() as patch:
        patch.setattr(cudnn, "_convolve", convolve)
        assert forms(cmfast.accelerate(net, tune=True), inputs)[0] != "torch"
    clock.measured.clear()
    assert forms(cmfast.accelerate(net, tune=True), inputs)[0] == "torch"
    assert clock.measured == ["torch"]


def test_measurements_of_something_else_are_not_read(monkeypatch, tmp_path):
    net, inputs = nn.Conv2d(16, 8, 1).eval().to(DEVICE), [torch.randn(1, 16, 2, 2, device=DEVICE)]
    clock = Clock(monkeypatch, favour("torch"))
    path = tmp_path / measurements.file_name(measurements.card(DEVICE))

    def measured_anew():
        clock.measured.clear()
        monkeypatch.setattr(tuning, "_measured", {})
        cmfast.accelerate(net, tune=True, cache=tmp_path)(*inputs)
        return bool(clock.measured)

    assert [measured_anew(), measured_anew()] == [True, False]
    here = measurements.versions(DEVICE)
    for name in here:
        read_before = read(path)
        read_before.versions[name] = "another"
        read_before.write(path)
        assert measured_anew()
        assert read(path).versions == here
    monkeypatch.setattr(measurements, "card", lambda device: CARD)
    assert measured_anew()
    assert {p.name for p in tmp_path.glob("*.json")} == {path.name, "forms-nvidia-h100-80gb-hbm3.json"}


@pytest.mark.parametrize("text", ["", "[1]", '{"versions": {"card": 1}}', '{"calls": {"a": {"seconds": {"b": "c"}}}}'])
def test_a_damaged_file_is_reported_and_measured_again(monkeypatch, tmp_path, caplog, text):
    net, inputs = small()
    clock = Clock(monkeypatch, favour("torch"))
    path = tmp_path / measurements.file_name(measurements.card(DEVICE))
    path.write_text(text)
    with caplog.at_level(logging.WARNING, logger="cmfast"):
        cmfast.accelerate(net, tune=True, cache=tmp_path)(*inputs)
    assert clock.measured
    assert "is not a file of measured forms" in caplog.text
    assert len(read(path).calls) == 2


def shipped(card, calls, **changes):
    """Put a file of measurements into the package."""
    versions = measurements.versions(DEVICE) | {"card": card, "torch": "another"} | changes
    Measurements(versions, 1e-6, 3e12, calls).write(measurements.FOLDER / measurements.file_name(card))
    measurements._shipped_files.cache_clear()


def measured(net, inputs):
    """The calls of a network, with torch's form as the fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_measured", {})
        Clock(patch, favour("torch"))
        cmfast.accelerate(net, BF16, tune=True)(*inputs)
        return next(iter(tuning._measured.values())).calls


def test_what_ships_with_the_package_is_taken(monkeypatch, caplog):
    net, inputs = small()
    calls = measured(net, inputs)
    card = measurements.card(DEVICE)
    for name, changes in ((CARD, {}), (card, {"kernels": "0"}), (card, {"triton": "3.0"}), (card, {})):
        shipped(name, calls, **changes)
        fast = cmfast.accelerate(net, BF16)
        taken = forms(fast, inputs)
        assert (taken == ["torch", "torch"]) == (name == card and not changes)
    assert error(fast(*inputs), exact(net, inputs)) < 2e-2
    assert "torch" not in forms(fast, [torch.cat((*inputs, *inputs))])  # which was not measured, nor any large one
    (measurements.FOLDER / measurements.file_name(card)).write_text("{")
    measurements._shipped_files.cache_clear()
    assert "torch" not in forms(cmfast.accelerate(net, BF16), inputs)
    assert "measurements that cannot be used" in caplog.text


def test_a_plan_has_what_ships_for_its_card():
    net, inputs = small()
    calls = measured(net, inputs)
    before = plan(net, inputs)
    shipped(CARD, calls)
    after = plan(net, inputs)
    assert not [p for p in before if p.reason]
    assert [p.operator for p in after if p.reason] == ["aten.convolution", "aten.add", "aten.addmm"]
    assert {p.operator: p.flops for p in after}["aten.convolution"] == 2 * 16 * 16 * 16 * 9
    assert not [p for p in plan(net, inputs, gpu="A100") if p.reason]


def rates(**products):
    """Measurements of large convolutions in bfloat16: operations a second by backend."""
    found = {f"{backend} {i}": 4e9 / rate for backend, rate in products.items() for i in range(1)}
    return Measurements({}, 1e-6, 3e12, {"large": {"flops": 4e9, "dtype": "bfloat16", "seconds": found}})


def test_the_rule_counts_bytes_operations_and_launches():
    """Between the two forms of a call that was not measured."""
    large = call(image(16, 192, 64, 64, dtype=BF16), 192, 3)  # 43 GFLOP: 0.11 ms at 400 TFLOP/s
    tiny = call(image(1, 16, 8, 8, dtype=BF16), 16, 3)
    both = ["triton", "torch"]
    faster = rates(triton=400e12, torch=800e12)
    assert Rule("sm_90", faster)(large, both) == Form("torch")
    assert Rule("sm_90", faster)(tiny, both) == Form("triton")  # with a launch less
    # 0.108 ms of operations, and 0.07 ms more of the addition of the bias, which reads and writes 25 MB.
    assert Rule("sm_90", rates(triton=400e12, torch=430e12))(large, both) == Form("triton")
    assert Rule("sm_90", rates(triton=400e12))(large, both) == Form("triton")
    assert Rule("sm_90", faster)(large._replace(dtype=F32), both) == Form("triton")
    assert Rule("sm_90", faster)(large, ["triton"]) == Form("triton")
    assert Rule("sm_90")(large, both) == Form("triton")
    assert faster.flops_per_second("torch", BF16) == pytest.approx(800e12)


def test_a_call_has_a_name_of_all_that_counts():
    a = call(image(2, 4, 6, 6), 8, 3)
    others = [
        call(image(1, 4, 6, 6), 8, 3),
        call(image(2, 4, 6, 6), 8, 3, stride=2),
        call(image(2, 4, 6, 6), 8, 3, padding=[0, 1, 0, 1]),
        call(image(2, 4, 6, 6), 8, 3, bias=None),
        call(image(2, 4, 6, 6), 8, 3, dtype=BF16),
        call(image(2, 4, 6, 6, dtype=BF16), 8, 3),
        call(image(2, 4, 6, 7)[..., :6], 8, 3),
        call(image(2, 4, 6, 6), 8, 3, residual=same()),
        call(image(2, 2, 6, 6), 8, 3, skip=image(2, 2, 6, 6)),
        *(a._replace(**{name: True}) for name in ("silu", "relu", "moments")),
        *(a._replace(resample=how) for how in ("nearest", "average")),
    ]
    names = {describe(other) for other in (a, *others)}
    assert len(names) == 1 + len(others)
    assert describe(a) == describe(call(image(2, 4, 6, 6), 8, 3))


@torch.no_grad()
def test_weights_that_were_given_up_keep_their_form(monkeypatch):
    net, inputs = small()
    expected = exact(net, inputs)
    clock = Clock(monkeypatch, favour("torch"))
    fast = cmfast.accelerate(net, BF16, tune=True, keep_weights=False)
    assert error(fast(*inputs), expected) < 2e-2
    clock.seconds = favour((64, 32))
    twice = torch.cat((*inputs, *inputs))
    assert error(fast(twice)[:1], expected) < 2e-2
    assert forms(fast, [twice]) == ["torch", "torch"]
    weights = accelerator_of(fast).target.weights.of
    assert (len(weights["torch"]), len(weights["triton"])) == (2, 0)
    assert all(p.is_meta for p in fast.parameters() if p.ndim > 1)


@pytest.mark.parametrize(("kind", "dtype"), [("pooled", F32), ("audio", BF16)], ids=str)
@torch.no_grad()
def test_a_network_by_torchs_convolutions(monkeypatch, kind, dtype):
    """It is right, and its launches are those of its plan."""
    monkeypatch.setattr(Rule, "__call__", lambda self, a, backends: Form("torch"))
    unet, inputs = network(kind)
    fast = cmfast.accelerate(unet, dtype)
    expected = exact(unet, inputs)
    if dtype == F32:
        assert error(fast(*inputs), expected) < 1e-5
    else:
        narrow = network(kind)[0].to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        assert error(fast(*inputs), expected) < 2 * error(narrow, expected)
    steps = accelerator_of(fast).executable(inputs).steps.steps
    planned = plan(unet, inputs, dtype=dtype)
    assert [(p.name, p.operator, p.reason) for p in planned] == [(s.name, s.operator, s.reason) for s in steps]
    assert {"aten.convolution", "aten.addmm"} <= {p.operator for p in planned}
    with monkeypatch.context() as patch:
        patch.setattr(Rule, "__call__", lambda self, a, backends: Form("triton"))
        ours = plan(unet, inputs, dtype=dtype)
    assert sum(p.flops for p in ours) == pytest.approx(sum(p.flops for p in planned), rel=0.02)
    assert len(planned) > len(ours)


def test_an_error_after_which_nothing_runs_is_no_forms_own(monkeypatch, tmp_path):
    """It says nothing of the form, and is not written down as if it did."""

    def convolve(*_):
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(cudnn, "_convolve", convolve)
    Clock(monkeypatch, favour("torch"))
    tuner = tuning.Tuner(DEVICE, "sm_90", tmp_path)
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        tuner(call(image(1, 24, 8, 8), 24, 3), ["triton", "torch"])
    assert not list(tmp_path.iterdir())


def test_a_network_is_not_made_ready_while_a_graph_is_captured(monkeypatch):
    net, inputs = small()
    fast = cmfast.accelerate(net)
    target = accelerator_of(fast).target
    with monkeypatch.context() as patch:
        patch.setattr(target, "device", torch.device("cuda"))
        patch.setattr("cmfast.engine.accelerator._check_devices", lambda *_: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: call it once before"),
        ):
            fast(*inputs)
    with torch.no_grad():
        assert error(fast(*inputs), exact(net, inputs)) < 1e-5


@pytest.mark.skipif(ON_GPU, reason="the stand-ins are of a GPU's streams and events")
def test_a_gpus_time_is_that_of_launches_in_a_graph(monkeypatch):
    log = []
    cuda = Cuda(log)
    cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda self: log.append("wait"), raising=False)
    cuda.launch = lambda: None
    # An event is a second after the last, by the stand-ins: a replay of six launches of two runs.
    found = timing.seconds([lambda: log.append("a"), lambda: log.append("b")], torch.device("cuda"))
    assert found == pytest.approx(1 / 8)
    assert log.count("capture") == 1
    assert log.count("replay") == timing.ROUNDS + 1
    assert log[-1] == "wait"


def test_time_on_a_cpu():
    assert 0 <= timing.seconds([lambda: None] * 3, torch.device("cpu")) < 1


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@torch.no_grad()
def test_tuning_on_a_gpu(tmp_path):
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, BF16, tune=True, cache=tmp_path)
    assert error(fast(*inputs), exact(unet, inputs)) < 5e-2
    (path,) = tmp_path.glob("*.json")
    found = read(path)
    assert all(len([s for s in c["seconds"].values() if s]) > 2 for c in found.calls.values())
    assert 1e-7 < found.launch_seconds < 1e-4
    assert 1e11 < found.bytes_per_second < 1e14

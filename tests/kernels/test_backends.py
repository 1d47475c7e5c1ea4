import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import cmfast.kernels
import pytest
import torch
from cmfast.kernels import (
    BackendError,
    attention,
    backend_report,
    backends,
    consistency_step,
    group_norm,
    native,
    reference,
    use_backend,
)
from cmfast.kernels import cpu as cpu_backend
from cmfast.kernels import cuda as cuda_backend
from cmfast.kernels import triton as triton_backend
from torch._subclasses import FakeTensorMode

from . import emulation

X = torch.ones(1, 4, 2, 2)
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
needs_emulation = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("CMFAST_BACKEND", raising=False)
    monkeypatch.delenv("CMFAST_GPU_ON_CPU", raising=False)
    backends._log_refusal.cache_clear()


@pytest.fixture(autouse=True)
def _no_cpu(request, monkeypatch):
    """Without the CPU kernels, the reference serves CPU tensors; the tests of the kernels themselves have them."""
    if "cpu_kernels" not in request.fixturenames:
        monkeypatch.setattr(native, "cpu", not_built("_cpu"))


@pytest.fixture
def cpu_kernels():
    try:
        isa = native.cpu().build_info()["isa"]
    except ImportError as error:
        pytest.skip(str(error))
    yield native.cpu()
    native.cpu().set_isa(isa)


def not_built(name):
    def missing():
        raise ImportError(native._NOT_BUILT[name])

    return missing


@pytest.fixture
def no_cuda(monkeypatch):
    """The extension is not built."""
    monkeypatch.setattr(native, "cuda", not_built("_cuda"))


def serves(op="consistency_step", tensors=(X,), backend=None):
    """The name of the backend that `resolve` chose."""
    return backends.resolve(op, tensors, backend).__module__.removeprefix("cmfast.kernels.").split(".")[0]


def test_auto_takes_the_first_that_is_available(monkeypatch):
    assert backends.BACKENDS[-1] == "reference"
    assert serves() == "reference"
    assert serves(backend="auto") == "reference"
    monkeypatch.setattr(backends, "BACKENDS", ("reference", "triton"))
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    assert serves() == "reference"


@needs_triton
@pytest.mark.usefixtures("no_cuda")
def test_auto_takes_triton_for_cpu_tensors_only_when_told(monkeypatch):
    for value in (None, "", "0", "true"):
        if value is not None:
            monkeypatch.setenv("CMFAST_GPU_ON_CPU", value)
        assert serves() == "reference"
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    assert serves() == "triton"


@needs_emulation
def test_auto_takes_cuda_before_triton(monkeypatch):
    with native.stand_in(emulation.emulated()):
        assert serves() == "reference"
        monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
        assert serves() == "cuda"
        assert serves(tensors=(X, X.double())) == "reference"


@needs_triton
@pytest.mark.usefixtures("no_cuda")
def test_the_argument_comes_before_the_context_before_the_environment(monkeypatch):
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    monkeypatch.setenv("CMFAST_BACKEND", "reference")
    assert serves() == "reference"
    with use_backend("triton"):
        assert serves() == "triton"
        assert serves(backend="reference") == "reference"
        with use_backend("auto"):
            assert serves() == "triton"
        with use_backend("reference"):
            assert serves() == "reference"
        assert serves() == "triton"
    assert serves() == "reference"
    monkeypatch.delenv("CMFAST_BACKEND")
    assert serves() == "triton"


def test_the_context_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backends._override is None


@pytest.mark.parametrize("name", ["cudnn", "Triton", ""])
def test_unknown_names(name, monkeypatch):
    with pytest.raises(BackendError, match=r"unknown backend.*auto, cuda, triton, cpu, reference"), use_backend(name):
        pass
    if name:
        with pytest.raises(BackendError, match="unknown backend"):
            consistency_step(X, X, 1.0, 1.0, backend=name)
        monkeypatch.setenv("CMFAST_BACKEND", name)
        with pytest.raises(BackendError, match="unknown backend"):
            group_norm(X, 2)


@needs_triton
@pytest.mark.parametrize(
    "call",
    [
        lambda b: consistency_step(X, X, 1.0, 1.0, backend=b),
        lambda b: group_norm(X, 2, backend=b),
        lambda b: attention(X, X, X, backend=b),
    ],
    ids=["consistency_step", "group_norm", "attention"],
)
def test_a_backend_asked_for_by_name_serves_or_says_why_not(call, monkeypatch):
    with pytest.raises(BackendError, match=r"backend 'triton' cannot serve .*: the tensors are on cpu"):
        call("triton")
    monkeypatch.setenv("CMFAST_BACKEND", "triton")
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        call(None)
    call("reference")


@needs_triton
def test_reasons(monkeypatch):
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    assert triton_backend.available("consistency_step", [X]) == (True, "")
    assert triton_backend.available("consistency_step", []) == (True, "")
    assert "float64" in triton_backend.available("consistency_step", [X, X.double()])[1]
    assert triton_backend.available("consistency_step", [X.to("meta")]) == (True, "")  # launches can be planned
    assert "cpu and meta" in triton_backend.available("consistency_step", [X, X.to("meta")])[1]
    with FakeTensorMode():
        gpu = torch.empty(1, device="cuda")
        assert triton_backend.available("consistency_step", [gpu]) == (True, "")
        other = torch.empty(1, device="cuda:1")
        assert triton_backend.available("consistency_step", [gpu, other])[1] == "the tensors are on cuda:0 and cuda:1"
    assert "cpu and cuda" in triton_backend.available("consistency_step", [X, gpu])[1]
    small = torch.empty(1, 2, 64, 64, dtype=torch.float8_e4m3fn, device="meta")
    assert triton_backend.available("attention", [small])[1] == "float8_e4m3fn is served by the reference"


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_backend._installed.cache_clear()
    monkeypatch.setattr(triton_backend, "_installed", triton_backend._installed.__wrapped__)
    with pytest.raises(BackendError, match=r"pip install \"cmfast\[triton\]\""):
        consistency_step(X, X, 1.0, 1.0, backend="triton")


def test_a_choice_for_cpu_tensors_looks_for_no_package(monkeypatch):
    def searched(name):
        raise AssertionError(f"looked for {name}")

    monkeypatch.delenv("CMFAST_GPU_ON_CPU", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", searched)
    monkeypatch.setattr(triton_backend, "available", lambda *_: searched("triton"))
    assert backends.resolve("group_norm", [X]).__module__.startswith("cmfast.kernels.")


@pytest.mark.usefixtures("no_cuda")
def test_without_the_extension_the_command_that_builds_it_is_named():
    with pytest.raises(BackendError, match=r"was not built: with nvcc on PATH, or CUDA_HOME .*`pip install -e .`"):
        consistency_step(X, X, 1.0, 1.0, backend="cuda")
    with pytest.raises(BackendError, match=r"was not built: with g\+\+ on PATH, or CXX .*`pip install -e .`"):
        consistency_step(X, X, 1.0, 1.0, backend="cpu")


def test_an_extension_that_does_not_load_is_a_refusal(monkeypatch):
    def broken(name):
        raise ImportError("an undefined symbol")

    monkeypatch.setattr(native, "_stand_in", {})
    monkeypatch.setattr(importlib, "import_module", broken)
    native._built.cache_clear()
    try:
        assert cuda_backend.available("consistency_step", [X]) == (
            False,
            "the extension cmfast._cuda does not load: an undefined symbol",
        )
    finally:
        native._built.cache_clear()


@pytest.mark.usefixtures("cpu_kernels")
def test_reasons_of_cpu():
    assert serves() == "cpu"
    assert serves(tensors=(X.bfloat16(),)) == "cpu"
    assert serves(tensors=(X, X.double())) == "reference"
    for op in ("group_norm", "attention", "consistency_step"):
        assert serves(f"{op}_backward") == "cpu"
        assert "float64" in cpu_backend.available(f"{op}_backward", [X, X.double()])[1]
    assert "no CPU kernel for dropout" in cpu_backend.available("dropout", [X])[1]
    assert "float64" in cpu_backend.available("consistency_step", [X, X.double()])[1]
    assert "on meta" in cpu_backend.available("consistency_step", [X.to("meta")])[1]


def test_an_instruction_set_is_chosen_by_name(cpu_kernels):
    for isa in cpu_kernels.build_info()["isas"].split(", "):
        assert cpu_kernels.set_isa(isa) == ""
        assert cpu_kernels.build_info()["isa"] == isa
    assert "no instruction set 'mmx' that runs here: choose one of" in cpu_kernels.set_isa("mmx")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", ["portable", "mmx"])
def test_the_environment_names_an_instruction_set(name):
    code = """
import torch
from cmfast import kernels
from cmfast.kernels import native
kernels.group_norm(torch.ones(1, 4, 2, 2), 2, backend="cpu")
print(native.cpu().build_info()["isa"])
"""
    environment = {**os.environ, "CMFAST_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if name == "portable":
        assert done.stdout.strip() == name, done.stderr
    else:
        assert "cannot serve group_norm: the CPU kernels have no instruction set 'mmx' that runs here" in done.stderr


def test_a_cpu_launchers_message_is_raised(cpu_kernels):
    with pytest.raises(RuntimeError, match=r"cmfast\._cpu\.attention: a size is not positive"):
        native.run("attention", (1, 1, 0, 1, 1), 0, False, *[(0, 0, 0, 0, 0)] * 4, 0, 1.0)


@needs_emulation
def test_reasons_of_cuda(monkeypatch):
    with native.stand_in(emulation.emulated()):
        assert (
            "no NVIDIA GPU was found" in cuda_backend.available("consistency_step", [])[1] or torch.cuda.is_available()
        )
        assert "the tensors are on cpu" in cuda_backend.available("consistency_step", [X])[1]
        monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
        assert cuda_backend.available("consistency_step", [X]) == (True, "")
        assert cuda_backend.available("consistency_step", []) == (True, "")
        assert "no CUDA kernel for channel_moments" in cuda_backend.available("channel_moments", [X])[1]
        assert "float64" in cuda_backend.available("consistency_step", [X, X.double()])[1]
        assert "on meta" in cuda_backend.available("consistency_step", [X.to("meta")])[1]
        with FakeTensorMode():
            gpu = torch.empty(1, device="cuda")
            assert cuda_backend.available("consistency_step", [gpu]) == (True, "")
        assert "cpu and cuda" in cuda_backend.available("consistency_step", [X, gpu])[1]


@needs_emulation
@pytest.mark.parametrize(
    ("capability", "hip", "ok"), [((7, 5), None, False), ((8, 0), None, True), ((9, 4), "6.4", False)]
)
def test_cuda_asks_for_ampere(capability, hip, ok, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.version, "hip", hip)
    cuda_backend._serves_device.cache_clear()
    with native.stand_in(emulation.emulated()):
        answer, reason = cuda_backend.available("consistency_step", [])
    cuda_backend._serves_device.cache_clear()
    assert answer == ok
    assert ok or ("AMD" if hip else "7.5") in reason


def test_a_build_that_does_not_run_on_the_gpu_leaves_it_to_others(monkeypatch):
    """One for other GPUs, or for a newer driver."""
    asked = []

    @contextlib.contextmanager
    def current(device):  # asking leaves another device the current one
        asked.append(f"device {device}")
        yield
        asked.append("the device before")

    monkeypatch.setattr(torch.cuda, "device", current)
    extension = types.SimpleNamespace(launchable=lambda device: asked.append(device) or "no kernel image is available")
    monkeypatch.setattr(native, "cuda", lambda: extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    cuda_backend._serves_device.cache_clear()
    answer, reason = cuda_backend._serves_device(3)
    cuda_backend._serves_device.cache_clear()
    assert asked == ["device 3", 3, "the device before"]
    assert not answer
    assert reason == "the CUDA kernels of this build do not run on the GPU: no kernel image is available"


@pytest.mark.parametrize(
    ("built", "device", "expected"),
    [
        (("sm_80", "sm_90", "PTX compute_80", "PTX compute_90"), (9, 0), 90),
        (("sm_80", "PTX compute_80"), (9, 0), 80),
        (("sm_80", "PTX compute_90"), (12, 0), 90),
        (("sm_80", "sm_120"), (8, 9), 80),
        (("sm_80", "sm_90a"), (9, 0), 90),
        (("sm_80", "sm_90a"), (10, 0), 80),
    ],
)
def test_launches_are_chosen_for_the_code_that_runs(monkeypatch, built, device, expected):
    """A build without code for clusters has no clusters, whatever the GPU could do."""
    extension = types.SimpleNamespace(build_info=lambda: {"architectures": ", ".join(built)})
    monkeypatch.setattr(native, "cuda", lambda: extension)
    assert capability(monkeypatch, device) == expected


@pytest.mark.skipif(isinstance(native._built("_cuda"), str), reason=str(native._built("_cuda")))
def test_launches_are_chosen_for_the_code_of_this_build(monkeypatch):
    monkeypatch.setattr(native, "_stand_in", {})
    assert capability(monkeypatch, (9, 0)) in (80, 90)  # by $CMFAST_CUDA_ARCHITECTURES


def capability(monkeypatch, device):
    """That which launches are chosen for on a device of this one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: device)
    native._device_capability.cache_clear()
    found = native._device_capability(0)
    native._device_capability.cache_clear()
    return found


@needs_emulation
def test_a_launchers_message_is_raised():
    x, rest = (0, 0, (1, 1)), ([None] * 5, [0.0] * 5, None, None, None, 0, 0, 0, 0)
    with (
        native.stand_in(emulation.emulated()),
        pytest.raises(RuntimeError, match="consistency_step: x has no elements"),
    ):
        native.launch("consistency_step", X, (0, 1), x, x, None, x, 0, 0, *rest)


def test_a_backend_that_does_not_import_is_a_refusal(monkeypatch):
    def broken(name):
        raise ImportError("its library is missing")

    monkeypatch.setattr(backends, "_module", broken)
    assert backends.available("triton", "attention") == (False, "its library is missing")


def test_a_refusal_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="cmfast.kernels"):
        for _ in range(3):
            consistency_step(X, X, 1.0, 1.0)
    # The test's machine has no CPU kernels; the GPU's backends are not asked about tensors of the CPU.
    refusals = [record.message for record in caplog.records]
    assert len(refusals) == 1
    assert "does not serve consistency_step" in refusals[0]


def test_report_names_every_operator():
    report = backend_report()
    assert list(report) == list(backends.BACKENDS)
    assert report["reference"] == dict.fromkeys(backends.OPERATORS, "yes")
    assert all(isinstance(reason, str) and reason for reason in report["triton"].values())
    assert all(hasattr(reference, op) for op in backends.OPERATORS)


@pytest.mark.parametrize("name", ["kernels", "elsewhere.kernels"])
def test_the_package_has_one_name(name):
    spec = importlib.util.spec_from_file_location(name, Path(cmfast.kernels.__file__))
    with pytest.raises(ImportError, match=f"imported as '{name}': install cmfast"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Tensors of a GPU that is not there: what an operator makes of them without running.


def fake(shape, dtype=torch.bfloat16, channels_last=False):
    x = torch.empty(shape, dtype=dtype, device="cuda")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def norm_arguments():
    rows = [fake((2, 64)) for _ in range(3)]
    return (fake((2, 64, 8, 8), channels_last=True), None, 32, fake((64,)), fake((64,)), 1e-5, *rows, True)


def attention_arguments():
    q, k, v = cmfast.kernels.split_qkv(fake((2, 64, 3 * 128)), 2)
    return q, k, v, 0.125


def step_arguments():
    x, model_output = fake((2, 3, 8, 8), torch.float32), fake((2, 3, 8, 8), channels_last=True)
    vectors = [fake((2,), torch.float32), None, None, None, None]
    return x, model_output, vectors, [0.0, 0.7, 0.9, 0.3, 1.7], -1.0, 1.0, None, 5, 1, 0, True, True


ARGUMENTS = {"group_norm": norm_arguments, "attention": attention_arguments, "consistency_step": step_arguments}


def call_backward(op, arguments, outputs):
    """The arguments of an operator's backward, for gradients like its outputs."""
    if op == "group_norm":
        h, skip, groups, weight, bias, _, add, scale, shift, silu = arguments
        return torch.empty_like(h), h, skip, groups, weight, bias, add, scale, shift, silu, *outputs[1:]
    if op == "attention":
        q, k, v, scale = arguments
        return torch.empty_like(outputs[0]), q, k, v, *outputs, scale
    x, model_output, vectors, scalars, low, high, *_ = arguments
    return [torch.empty_like(y) for y in outputs], x, model_output, vectors, scalars, low, high, torch.bfloat16


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck_of_fake_cuda_tensors(op, backend):
    with FakeTensorMode():
        arguments = ARGUMENTS[op]()
        operator = getattr(torch.ops.cmfast, op)
        torch.library.opcheck(operator.default, (*arguments, backend))
        outputs = operator(*arguments, backend)
        assert {y.device.type for y in outputs} == {"cuda"}
        backward = getattr(torch.ops.cmfast, f"{op}_backward")
        torch.library.opcheck(backward.default, (*call_backward(op, arguments, outputs), backend))


@needs_triton
@pytest.mark.parametrize("op", ["consistency_step"])
def test_kernels_allocate_what_tracing_promises(op):
    from cmfast.kernels.triton import consistency as kernels

    def described(outputs):
        return [(y.shape, y.stride(), y.dtype, y.device) for y in outputs]

    with FakeTensorMode():
        arguments = ARGUMENTS[op]()
        outputs = getattr(torch.ops.cmfast, op)(*arguments, "triton")
        launches, planned = getattr(kernels, f"plan_{op}")(*arguments)
        assert described(planned) == described(outputs)
        assert len(launches) == 1
        arguments = call_backward(op, arguments, outputs)
        outputs = getattr(torch.ops.cmfast, f"{op}_backward")(*arguments, "triton")
        launches, planned = getattr(kernels, f"plan_{op}_backward")(*arguments)
        assert described(planned) == described(outputs)
        assert len(launches) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fake_cuda_tensors_trace_into_one_graph(backend):
    def f(x, weight, skip):
        h = group_norm((x, skip), 16, weight.repeat(2), activation="silu", backend="triton")
        q, k, v = cmfast.kernels.split_qkv(h.flatten(2).repeat(1, 3, 1), 2, channels_dim=1)
        h = h + attention(q, k, v, backend="triton").transpose(2, 3).reshape(h.shape)
        return consistency_step(h, h * 2, 0.5, 0.7, beta=0.3, seed=3, input_scale=1.5, backend="triton").model_input

    torch._dynamo.reset()
    with FakeTensorMode():  # no gradients: torch without CUDA has no autograd for its tensors
        y = torch.compile(f, fullgraph=True, backend=backend)(fake((2, 64, 8, 8)), fake((64,)), fake((2, 64, 8, 8)))
    assert (y.shape, y.dtype, y.device.type) == ((2, 128, 8, 8), torch.bfloat16, "cuda")

"""Each form of a convolution computes what its definition does, as steps of known launches."""

import contextlib
import math

import pytest
import torch
from cmfast.kernels import native, reference
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.cuda import conv_plan

from cmfast.engine.cuda import cudnn
from cmfast.engine.cuda.convolutions import LOWERED, alone, lower_conv2d
from cmfast.engine.cuda.executable import Executable
from cmfast.engine.cuda.forms import Form, candidates
from cmfast.engine.cuda.launches import available, launch_of
from cmfast.engine.cuda.weights import pack

from ...kernels import emulation
from ..networks import error
from .device import DEVICE, ON_GPU

F32, BF16 = torch.float32, torch.bfloat16


def image(*shape, dtype=F32):
    return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype, device="meta").movedim(-1, 1)


def row(*shape):
    return torch.empty(shape, device="meta")


def call(
    h, columns, kernel, *, padding=None, stride=1, bias=True, dtype=None, skip=None, residual=None, **others
) -> ConvArguments:
    """The arguments of a call, without data but for the bias."""
    dims = h.ndim - 2
    torch.manual_seed(0)
    bias = torch.randn(columns, device=DEVICE) if bias is True else bias
    channels = h.shape[1] + (0 if skip is None or others.get("gate") else skip.shape[1])
    padding = [kernel // 2] * 2 * dims if padding is None else padding
    weight = torch.empty(columns, channels, *(kernel,) * dims, device="meta")
    numbers = (1, False, [stride] * dims, padding, dtype or h.dtype)
    a = ConvArguments(h, skip, weight, bias, None, *numbers, **others)
    return a if residual is None else a._replace(residual=residual(a.output_shape()))


def same(dtype=F32):
    return lambda shape: image(*shape, dtype=dtype)


def scaled(factor):
    return lambda shape: image(*shape[:2], *(int(factor * size) for size in shape[2:]))


CASES = {
    "3x3": (lambda: call(image(2, 5, 4, 3), 6, 3), ["convolution", "add"]),
    "1x1": (lambda: call(image(2, 5, 4, 3), 6, 1), ["addmm"]),
    "no bias, relu": (lambda: call(image(1, 5, 3, 3), 6, 1, bias=None, relu=True), ["mm", "relu"]),
    "bias of a value": (lambda: call(image(1, 5, 3, 3), 6, 1, bias=row(6)), ["mm", "add"]),
    "residual, moments": (
        lambda: call(image(2, 5, 4, 4), 6, 3, residual=same(), relu=True, moments=True),
        ["convolution", "add", "add", "relu", "channel_moments"],
    ),
    "pair, norm": (
        lambda: call(image(2, 3, 4, 4), 6, 3, skip=image(2, 4, 4, 4), gain=row(2, 7), offset=row(2, 7), silu=True),
        ["conv2d (conv_input_kernel)", "convolution", "add"],
    ),
    "gate": (
        lambda: call(image(2, 5, 3), 4, 1, skip=image(2, 5, 3), gate="gelu"),
        ["conv2d (conv_input_kernel)", "addmm"],
    ),
    "nearest": (
        lambda: call(image(2, 4, 3, 2), 3, 3, resample="nearest", residual=scaled(0.5), residual_resample="nearest"),
        ["clone", "convolution", "add", "add"],
    ),
    "average": (
        lambda: call(image(1, 4, 6, 4), 3, 3, resample="average", residual=scaled(2), residual_resample="average"),
        ["conv2d (conv_input_kernel)", "convolution", "conv2d (conv_input_kernel)", "add", "add"],
    ),
    "stride": (lambda: call(image(1, 4, 5, 7), 3, 3, stride=2), ["convolution", "add"]),
    "one side": (
        lambda: call(image(1, 4, 5, 4), 3, 3, stride=2, padding=[0, 1, 0, 1]),
        ["zero", "clone", "convolution", "add"],
    ),
    "audio": (
        lambda: call(image(2, 4, 6), 3, 3, resample="nearest", residual=same(), moments=True),
        ["clone", "convolution", "add", "add", "channel_moments"],
    ),
    "video": (
        lambda: call(image(1, 4, 3, 4, 2), 3, 3, resample="nearest", residual=lambda s: image(*s[:3], 4, 2),
                     residual_resample="nearest"),
        ["clone", "convolution", "add", "add"],
    ),
    "a row in float32": (lambda: call(image(2, 8, 1, 1), 6, 1, dtype=BF16), ["clone", "mm", "add"]),
    "as it was": (lambda: call(image(2, 8, 1, 1), 6, 1, dtype=BF16, bias=None), ["clone", "mm", "clone"]),
    "bfloat16": (
        lambda: call(image(2, 8, 4, 4, dtype=BF16), 6, 3, residual=same(BF16), moments=True),
        ["convolution", "add", "add", "channel_moments"],
    ),
    "cropped": (lambda: call(image(1, 4, 5, 6)[:, :, :, 1:5], 3, 1), ["clone", "addmm"]),
}  # fmt: skip


def run(form, a, seed=1):
    """(the steps, the results, those of the definition) of a call on normal values."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(a.weight.shape, generator=generator, device=DEVICE) / math.sqrt(a.weight[0].numel())
    steps, given = alone(a)
    out, moments = lower_conv2d(form, steps, "layer", given, pack(weight, a.dtype, form.backend), "sm_90")
    steps.want([out, moments] if a.moments else [out])
    inputs = [torch.randn(t.shape, generator=generator, device=DEVICE).to(t.dtype) for t in steps.inputs]
    places = {id(t): x for t, x in zip(steps.inputs, inputs, strict=True)}
    real = ConvArguments(*(places.get(id(t), t) for t in given))._replace(weight=weight)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in real]
    found = Executable(steps, {}, [t.dtype for t in steps.outputs], DEVICE, graphs=False)(inputs)
    return steps.steps, found, reference.conv2d(ConvArguments(*wide))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_torchs_form_is_the_convolution(name):
    make, names = CASES[name]
    a = make()
    steps, found, (expected, moments) = run(Form("torch"), a)
    assert [step.operator.removeprefix("aten.") for step in steps] == names
    for step in steps:
        assert (launch_of(step) is None) == bool(step.reason) == step.operator.startswith("aten.")
    limit = 1e-6 if a.dtype == F32 else 1e-2
    assert found[0].shape == expected.shape
    assert found[0].dtype == a.h.dtype
    assert error(found[0], expected) < limit
    if a.moments:
        for i in range(2):
            assert (found[1][:, i].double() - moments[:, i]).norm() < limit * moments[:, 1].norm()


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@torch.no_grad()
def test_the_form_of_the_extension_is_the_convolution(dtype, monkeypatch):
    """On a GPU, or in the emulation; with weights that Triton's form reads too."""
    if not ON_GPU and emulation.missing():
        pytest.skip(emulation.missing())
    monkeypatch.setattr(conv_plan, "PROGRAMS", 2)
    norm = {"gain": row(1, 40), "offset": row(1, 40), "silu": True}
    a = call(image(1, 24, 9, 7, dtype=dtype), 48, 3, skip=image(1, 16, 9, 7, dtype=dtype), residual=same(dtype),
             moments=True, **norm)  # fmt: skip
    with contextlib.nullcontext() if ON_GPU else native.stand_in(emulation.emulated()):
        assert available("conv2d", DEVICE, [a.h, a.skip, a.weight.to(dtype), a.residual], "cuda", [a])[0]
        steps, found, (expected, moments) = run(Form("cuda"), a)
    assert [step.operator for step in steps] == ["conv2d"]
    assert error(found[0], expected) < 1e-2
    for i in range(2):
        assert (found[1][:, i].double() - moments[:, i]).norm() < 1e-2 * moments[:, 1].norm()
    strided = a._replace(stride=[2, 2])
    assert "stride 1" in available("conv2d", DEVICE, [a.h], "cuda", [strided])[1]


@torch.no_grad()
def test_every_candidate_is_the_convolution():
    a = call(image(1, 64, 8, 8, dtype=BF16), 32, 3, residual=same(BF16), moments=True)
    forms = candidates(a, ["triton", "torch"], "sm_90")
    assert [form.backend for form in forms] == ["triton"] * (len(forms) - 1) + ["torch"]
    assert len({str(form) for form in forms}) == len(forms) > 4
    tiles = set()
    for form in forms[::2]:
        steps, found, (expected, _) = run(form, a)
        assert error(found[0], expected) < 1e-2
        if form.backend == "triton":
            constants = launch_of(steps[-1]).constants
            assert (constants["BLOCK_M"], constants["SEGMENTS"]) == (form.config.block_m, form.config.segments)
            tiles.add((constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"], constants["SEGMENTS"]))
    assert len(tiles) > 2


def test_a_gpu_gives_the_convolution_to_cudnn(monkeypatch):
    """What cannot run here: its operator is called with what it takes, in float32 without tf32."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []

    class Cudnn:
        def out(self, u, weight, *numbers, out):
            asked.append((list(u.shape), list(weight.shape), *numbers, list(out.shape)))

    assert [a.name for a in torch.ops.aten.cudnn_convolution.out._schema.arguments][2:] == [
        "padding", "stride", "dilation", "groups", "benchmark", "deterministic", "allow_tf32", "out"
    ]  # fmt: skip
    monkeypatch.setattr(cudnn._aten, "cudnn_convolution", Cudnn())
    for shape, kernel in (((1, 4, 8), (5,)), ((1, 4, 8, 6), (5, 3)), ((1, 4, 3, 8, 6), (3, 5, 3))):
        u, weight = torch.empty(shape).as_subclass(OnGpu), torch.empty(7, 4, *kernel)
        cudnn._convolve(torch.empty(1, 7, *shape[2:]), u, weight, [1] * len(kernel), [k // 2 for k in kernel])
    assert asked == [
        ([1, 4, 1, 8], [7, 4, 1, 5], [0, 2], [1, 1], [1, 1], 1, False, False, False, [1, 7, 1, 8]),
        ([1, 4, 8, 6], [7, 4, 5, 3], [2, 1], [1, 1], [1, 1], 1, False, False, False, [1, 7, 8, 6]),
        ([1, 4, 3, 8, 6], [7, 4, 3, 5, 3], [1, 2, 1], [1] * 3, [1] * 3, 1, False, False, False, [1, 7, 3, 8, 6]),
    ]


def test_every_backend_of_forms_has_weights_configurations_and_steps():
    from cmfast.engine.cuda import forms, weights

    assert list(LOWERED) == list(forms._CONFIGS) == list(weights.PACKINGS)
    assert list(LOWERED)[-1] == "torch"

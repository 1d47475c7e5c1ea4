"""Networks on the target for GPUs."""

import copy
import logging
import threading

import pytest
import torch
from cmfast.kernels import native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cmfast
from cmfast.engine import Accelerator
from cmfast.engine.accelerator import accelerator_of, device_of, products_of
from cmfast.engine.cuda import GpuTarget

from ..networks import error, exact
from .device import DEVICE, ON_GPU, network

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Each network in one dtype: an evaluation takes Triton's interpreter seconds.
ACCURATE = ("film", "pooled", "video", "patches")
NARROW = (("film", BF16), ("added", F16), ("strided", BF16), ("audio", BF16))


def gpu(unet, dtype=F32, **options):
    fast = Accelerator(unet, dtype, **options)
    assert isinstance(fast.target, GpuTarget)
    return fast


class Small(nn.Module):
    """A norm between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.last(nn.functional.silu(self.norm(self.first(x))))


def small(batch=2):
    """(network, its inputs)."""
    torch.manual_seed(0)
    return Small().eval().to(DEVICE), [torch.randn(batch, 3, 6, 6, device=DEVICE)]


def narrow(unet, inputs, dtype):
    """The output of the network in a narrow dtype, by torch."""
    return copy.deepcopy(unet).to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))


@pytest.mark.parametrize("kind", ACCURATE)
@torch.no_grad()
def test_float32_is_accurate(kind):
    unet, inputs = network(kind)
    assert error(gpu(unet)(*inputs), exact(unet, inputs)) < 1e-5


@pytest.mark.parametrize(("kind", "dtype"), NARROW, ids=str)
@torch.no_grad()
def test_narrow_dtypes_err_no_more_than_torch(kind, dtype):
    unet, inputs = network(kind)
    expected = exact(unet, inputs)
    out = gpu(unet, dtype)(*inputs)
    assert out.dtype == F32
    assert error(out, expected) < 2 * error(narrow(unet, inputs, dtype), expected)


@torch.no_grad()
def test_several_shapes_share_the_weights():
    net, _ = small()
    fast = gpu(net, BF16)
    sizes, places = set(), set()
    for batch, size in ((1, 6), (3, 6), (2, 9), (1, 6)):
        x = torch.randn(batch, 3, size, size + 1, device=DEVICE)
        expected = exact(net, [x])
        assert error(fast(x), expected) < 2 * error(narrow(net, [x], BF16), expected)
        sizes.add(fast.target.bytes)
        places.add(tuple(t.data_ptr() for t in fast.target.weights.of["triton"].values()))
    assert sizes == {2 * 27 * 8 + 2 * 72 * 4}
    assert len(places) == 1


@torch.no_grad()
def test_convolutions_that_no_kernel_serves(monkeypatch):
    monkeypatch.setattr(
        "cmfast.engine.cuda.convolutions.available", lambda op, device, tensors, *_: (tensors[0].shape[1] > 3, "no")
    )
    net, inputs = small()
    fast = gpu(net, BF16)
    for x in (*inputs, torch.cat((*inputs, *inputs))):
        expected = exact(net, [x])
        assert error(fast(x), expected) < 2 * error(narrow(net, [x], BF16), expected)
    weights = fast.target.weights.of
    assert (list(weights["torch"]), list(weights["triton"])) == (["first.weight"], ["last.weight"])
    assert weights["torch"]["first.weight"].dtype == BF16


@torch.no_grad()
def test_a_sample_has_the_same_bits_in_any_batch():
    net, (x,) = small(3)
    fast = gpu(net, BF16)
    assert torch.equal(fast(x)[1:2], fast(x[1:2]))


@torch.no_grad()
def test_timesteps_are_embedded_in_float32():
    unet, (x, t, labels) = network("film")
    fast = gpu(unet, BF16)
    executable = fast.executable((x, t, labels))
    assert [value.dtype for value in executable.steps.inputs] == [BF16, F32, torch.int64]
    by_torch = [step for step in executable.steps.steps if step.reason]
    assert {out.dtype for step in by_torch for out in step.arguments[0]} == {F32}
    (embedding,) = [step for step in executable.steps.steps if step.operator == "timestep_embedding"]
    assert {value.dtype for value in embedding.arguments if isinstance(value, torch.Tensor)} == {F32}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@torch.no_grad()
def test_networks_are_evaluated_in_their_own_dtype(dtype):
    net, (x,) = small()
    expected = exact(net, [x])
    half = copy.deepcopy(net).to(dtype)
    fast = cmfast.accelerate(half)
    out = fast(x.to(dtype))
    assert accelerator_of(fast).products == out.dtype == dtype
    assert error(out, expected) < 2 * error(half(x.to(dtype)), expected)


class Odd(nn.Module):
    """A bit of everything that torch computes, in float32 beside the images."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.query, self.context = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(5, 64)
        self.position, self.last = nn.Parameter(torch.randn(1, 16, 8)), nn.Linear(32, 3)
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x, level, context, *, scale=1.0):
        h = self.grouped(self.first(x * scale))
        h = torch.lerp(h, torch.cat((h[:, 4:], h[:, :4]), 1), level[:, None, None, None])
        tokens = self.norm(h.flatten(2).mT + self.position) * (1 + level[:, None, None])
        q = self.query(tokens).unflatten(2, (2, 16)).transpose(1, 2)
        k, v = self.context(context).unflatten(2, (4, 16)).transpose(1, 2).chunk(2, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = self.last(y).mT.unflatten(2, (4, 4)) + x
        return {"image": image, "mean": (h.mean((1, 2, 3)), self.steps + 1)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@torch.no_grad()
def test_what_torch_computes_meets_images_of_another_dtype(dtype, batch):
    torch.manual_seed(0)
    net = Odd().eval().to(DEVICE)
    x, level, context = (torch.randn(batch, *size, device=DEVICE) for size in ((3, 4, 4), (), (6, 5)))
    expected = net(x, level, context, scale=2.0)
    found = gpu(net, dtype)(x, level, context, scale=2.0)
    assert found.keys() == expected.keys()
    mean, steps = found["mean"]
    tolerance = {F32: 1e-5, BF16: 4e-2, F16: 5e-3}[dtype]
    for a, b in ((found["image"], expected["image"]), (mean, expected["mean"][0])):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert torch.equal(steps, net.steps + 1)


@torch.no_grad()
def test_the_model_keeps_its_type_and_its_keys():
    net, inputs = small()
    fast = cmfast.accelerate(net, BF16)
    assert type(fast) is Small
    assert fast.state_dict().keys() == net.state_dict().keys()
    assert 1e-5 < error(fast(*inputs), exact(net, inputs)) < 2e-2
    assert cmfast.restore(fast)(*inputs).equal(net(*inputs))


@torch.no_grad()
def test_changed_weights_are_noticed():
    unet, inputs = small()
    fast = cmfast.accelerate(unet)
    before = fast(*inputs)
    for change in (
        lambda: unet.first.weight.mul_(1.5),
        lambda: unet.load_state_dict({k: 1.1 * v for k, v in unet.state_dict().items()}),
        lambda: setattr(unet.last, "bias", nn.Parameter(unet.last.bias + 1)),
    ):
        change()
        after = fast(*inputs)
        assert error(after, exact(unet, inputs)) < 1e-5
        assert not torch.equal(after, before)
        before = after


@pytest.mark.skipif(ON_GPU, reason="the variable is for CPU tensors")
@torch.no_grad()
def test_a_network_that_moves_to_the_other_target(monkeypatch):
    unet, inputs = small()
    fast = gpu(unet, F16)
    fast(*inputs)
    monkeypatch.delenv("CMFAST_GPU_ON_CPU")
    unet.last.bias.add_(1)
    with pytest.raises(ValueError, match=r"float32 or bfloat16 on the CPU: GPUs alone serve float16"):
        fast(*inputs)
    fast = Accelerator(unet, BF16)
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    unet.last.bias.add_(1)
    fast(*inputs)
    assert isinstance(fast.target, GpuTarget)


@torch.no_grad()
def test_weights_that_are_given_up():
    unet, inputs = small()
    expected = exact(unet, inputs)
    fast = cmfast.accelerate(unet, keep_weights=False)
    assert error(fast(*inputs), expected) < 1e-5


@torch.no_grad()
def test_without_a_c_compiler(monkeypatch):
    def missing():
        raise ImportError("the extension cmfast._cpu was not built")

    monkeypatch.setattr(native, "cpu", missing)
    net, inputs = small()
    fast = cmfast.accelerate(net)
    for _ in range(2):
        assert error(fast(*inputs), exact(net, inputs)) < 1e-5
        net.last.weight.mul_(1.5)
    net.norm.eps = 0.1
    assert error(fast(*inputs), exact(net, inputs)) < 1e-5


@torch.no_grad()
def test_a_network_in_parts():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3))

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    net, x = Loud().eval().to(DEVICE), torch.rand(2, 3, 8, 8, device=DEVICE)
    fast = gpu(net, BF16)
    torch.testing.assert_close(fast(x), net(x), rtol=3e-2, atol=3e-2)
    assert list(fast.left) == [""]


@torch.no_grad()
def test_torch_compile_leads_to_it(monkeypatch):
    targets = []
    monkeypatch.setattr(GpuTarget, "compile", lambda *a, compile=GpuTarget.compile: targets.append(a) or compile(*a))
    torch._dynamo.reset()
    net, inputs = small()
    found = torch.compile(net, backend="cmfast", options={"dtype": "float16"})(*inputs)
    assert len(targets) == 1
    assert error(found, exact(net, inputs)) < 1e-3
    torch._dynamo.reset()


@torch.no_grad()
def test_inputs_elsewhere_are_refused():
    unet, (x,) = small()
    fast = gpu(unet)
    with pytest.raises(ValueError, match=rf"expects inputs on {'the CPU' if DEVICE.type == 'cpu' else DEVICE}, got"):
        fast(x.to("meta"))


@torch.no_grad()
def test_threads_take_turns():
    unet, inputs = small()
    fast = gpu(unet)
    others = [x.flip(0).contiguous() for x in inputs]
    expected = [fast(*inputs), fast(*others)]
    wrong = []

    def call(given, wanted):
        for _ in range(3):
            if not torch.equal(fast(*given), wanted):
                wrong.append(wanted)

    threads = [threading.Thread(target=call, args=pair) for pair in zip((inputs, others), expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_digits():
    model = cmfast.load("digits", device=DEVICE)
    fast = cmfast.accelerate(model)
    assert accelerator_of(fast.unet).target.device == DEVICE
    torch.testing.assert_close(fast.sample(1, seed=3), model.sample(1, seed=3), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_explanation_counts_launches(caplog):
    net, inputs = small()
    with caplog.at_level(logging.WARNING):
        found = cmfast.explain(cmfast.accelerate(net, BF16), *inputs)
    assert found.captured == {"": 1}
    assert found.kernels == {"conv2d": 2, "apply_group_norm": 1}
    assert found.torch == {}
    assert found.passes["group_norms"] == found.passes["written_norms"] == 1
    assert "written_norms: 1 times. A group norm before a convolution of several taps" in str(found)
    assert found.value_bytes > 0
    assert found.weight_bytes == 2 * 27 * 8 + 2 * 72 * 4
    assert not caplog.records


def cuda(*shape, dtype=F32, index=0):
    """A tensor that says it is on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(*shape, dtype=dtype, device=f"cuda:{index}")


def test_dtypes_of_products(monkeypatch):
    for dtype in (None, F32, BF16, F16):
        assert products_of([cuda(2)], dtype) == (dtype or F32)
        assert products_of([cuda(2, dtype=dtype or F32)], None) == (dtype or F32)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        products_of([cuda(2)], torch.float64)
    with pytest.raises(ValueError, match="float64 networks"):
        products_of([cuda(2, dtype=torch.float64)], None)
    monkeypatch.delenv("CMFAST_GPU_ON_CPU")
    assert products_of([torch.empty(2, dtype=F16)], None) == F32
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16, which GPUs alone"):
        products_of([torch.empty(2)], F16)


def test_devices_of_parameters():
    assert device_of([cuda(2, index=1), cuda(1, index=1)]) == torch.device("cuda:1")
    assert device_of([]) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"on one device, got some on each of cuda:0, cpu"):
        device_of([cuda(2), torch.empty(2)])

"""Networks of other projects: right, of the same type and keys, and nothing that costs time is left to torch."""

import copy
import os

import pytest
import torch
from torch.utils import _pytree as pytree

import cmfast
from cmfast.engine import dynamo
from cmfast.engine.accelerator import Accelerator, accelerator_of

from .guided_diffusion import GroupNorm32
from .networks import FAMILIES, build

#: Operators that the kernels have: of these networks torch must be left none.
OURS = {
    "aten.convolution",
    "aten.addmm",
    "aten.mm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._softmax",
    "aten._safe_softmax",
    "aten.native_group_norm",
    "aten.native_layer_norm",
    "cmfast.conv2d",
    "cmfast.attention",
    "cmfast.group_norm",
    "cmfast.channel_norm",
}
#: But for products that are no attention of the kernels': linear attention, and attention with a mask.
LINEAR_ATTENTION, MASKED = {"aten.bmm", "aten._softmax"}, {"aten.bmm", "aten._safe_softmax"}
LEFT = {
    "denoising-diffusion": LINEAR_ATTENTION,
    "denoising-diffusion, self-conditioned": LINEAR_ATTENTION,
    "denoising-diffusion, no self-condition yet": LINEAR_ATTENTION,
    "k-diffusion, cross attention": MASKED,
}

#: One of each kind of network, for what takes long; CMFAST_FAMILIES=full takes all of them.
SOME = (
    "UNet2DModel, skip blocks",
    "LCM",
    "AutoencoderTiny's decoder",
    "denoising-diffusion",
    "k-diffusion, cross attention",
)


def image(output):
    return output if isinstance(output, torch.Tensor) else output.sample


def cast(given, dtype):
    """All floating-point tensors of a network's inputs in another dtype."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, given)


def of_dtype(network, dtype, args, kwargs):
    """What torch computes in another dtype, but for what the network itself does in float32, of which it is cast."""
    network = copy.deepcopy(network).to(dtype)
    for module in network.modules():
        if isinstance(module, GroupNorm32):
            module.float()
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, given: (given[0].to(m.weight.dtype),))
    return image(network(*cast(args, dtype), **cast(kwargs, dtype)))


def exact(network, args, kwargs):
    return of_dtype(network, torch.float64, args, kwargs)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("batch", "is_odd"), [(1, False), (3, True)], ids=["one sample", "three of an odd size"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_right_and_served_by_kernels(name, batch, is_odd):
    network, inputs = build(name)
    args, kwargs = inputs(batch, is_odd)
    expected = network(*args, **kwargs)
    fast = cmfast.accelerate(network)
    found = fast(*args, **kwargs)
    assert type(fast) is type(network)
    assert type(found) is type(expected)
    assert image(found).shape == image(expected).shape
    assert fast.state_dict().keys() == network.state_dict().keys()
    assert error(image(found), exact(network, args, kwargs)) < 1e-5
    steps = accelerator_of(fast).executable(args, kwargs).steps.steps
    assert {step.operator for step in steps if step.reason} & OURS == LEFT.get(name, set())


@pytest.mark.parametrize("name", FAMILIES if os.environ.get("CMFAST_FAMILIES") == "full" else SOME)
@torch.no_grad()
def test_torch_compile_leads_to_the_engine(name, monkeypatch):
    served = []

    class Counted(Accelerator):
        def __call__(self, *args):
            served.append((self, args))
            return super().__call__(*args)

    monkeypatch.setattr(dynamo, "Accelerator", Counted)
    torch._dynamo.reset()
    network, inputs = build(name)
    args, kwargs = inputs(1, True)
    found = torch.compile(network, backend="cmfast", fullgraph=True)(*args, **kwargs)
    assert type(found) is type(network(*args, **kwargs))
    assert error(image(found), exact(network, args, kwargs)) < 1e-5
    ((accelerator, given),) = served
    steps = accelerator.executable(given).steps.steps
    assert {step.operator for step in steps if step.reason} & OURS == LEFT.get(name, set())
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_bfloat16_is_as_accurate_as_torchs(name):
    network, inputs = build(name)
    args, kwargs = inputs(3, True)
    expected = exact(network, args, kwargs)
    found = image(cmfast.accelerate(network, torch.bfloat16)(*args, **kwargs))
    assert error(found, expected) < 2 * error(of_dtype(network, torch.bfloat16, args, kwargs), expected)

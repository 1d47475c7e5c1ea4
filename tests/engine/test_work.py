"""Operations are those that FlopCounterMode counts; bytes are those of the tensors."""

import pytest
import torch
from cmfast.kernels.conv_arguments import ConvArguments
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cmfast import kernels, load
from cmfast.engine import Accelerator, work
from cmfast.engine.graph import CONV

from .networks import network


@torch.no_grad()
def counted(net, inputs):
    """What torch counts, with the attention that it has no formula for on the CPU, and cmfast's, as on a GPU."""

    def attention(q, k, v, *_, out_shape=None, **__):
        return sdpa_flop_count(q, k, v)

    uncounted = torch.ops.cmfast.attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(uncounted, attention)) as counter:
        net(*inputs)
    return counter.get_total_flops()


def diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    config = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16}
    types = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    types |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    net = diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=2, **config, **types).eval()
    return net, (torch.randn(2, 4, 8, 8), torch.tensor(3.0), torch.randn(2, 5, 16))


def torchs_own():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 4, 1))
    return net.eval(), (torch.randn(2, 8, 9, 9),)


def digits():
    unet = load("digits").unet
    return unet, (torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), torch.arange(3))


@pytest.mark.parametrize(
    "make", [digits, diffusers_unet, torchs_own, *(lambda k=k: network(k) for k in ("film", "audio", "video"))]
)
@torch.no_grad()
def test_operations_are_those_of_torch(make):
    net, inputs = make()
    steps = Accelerator(net, torch.float32).executable(inputs).steps.steps
    assert sum(work.operations_of(steps)) == pytest.approx(counted(net, inputs), rel=0.01)
    assert sum(work.operations_of(steps)) > 0


def test_the_formulas_are_a_mapping_for_torchs_counter():
    unet, inputs = network("film")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(work.FORMULAS)) as counter:
        unet(*inputs)
    assert counter.get_total_flops() == counted(unet, inputs)


def test_bytes_of_steps_are_those_of_what_is_read_and_written():
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Tanh()).eval()
    steps = Accelerator(net, torch.float32).executable((torch.randn(2, 16, 4, 4),)).steps
    conv, tanh = steps.steps
    assert conv.node.target is CONV
    (given,) = [a for a in conv.arguments if isinstance(a, ConvArguments)]
    values = 4 * 2 * 16
    assert work.bytes_of(steps, 0) == (16 * values + 32 * values + given.packed.nbytes + 4 * 32, 0)
    assert work.bytes_of(steps, 1) == (2 * 32 * values, 0)
    assert tanh.layer == "1"


def test_bytes_of_calls():
    aten = torch.ops.aten
    x, row, table, index = torch.ones(4, 6), torch.ones(6), torch.ones(100, 6), torch.tensor([1, 2])
    assert work.bytes_of_call(aten.add.Tensor, ((x, row), {}), x + row) == 4 * (24 + 6 + 24)
    assert work.bytes_of_call(aten.mul.Tensor, ((x, x), {}), x * x) == 4 * (24 + 24)
    assert work.bytes_of_call(aten.view.default, ((x, [24]), {}), x.view(24)) == 0
    assert work.bytes_of_call(aten.embedding.default, ((table, index), {}), table[index]) == 4 * (12 + 12) + 16
    assert work.bytes_of_call(aten.add_.Tensor, ((x, row), {}), x) == 4 * (24 + 6)


def test_a_value_that_is_expanded_lies_in_memory_once():
    class Net(nn.Module):
        def forward(self, x, y):
            return x.expand(8, 5) * y

    steps = Accelerator(Net().eval(), torch.float32).executable((torch.randn(1, 5), torch.randn(8, 5))).steps
    assert [work.bytes_of(steps, i)[0] for i in range(len(steps.steps))] == [4 * (5 + 40 + 40)]


def test_the_dtype_of_products_is_what_is_named():
    half, wide = torch.ones(2, dtype=torch.float16), torch.ones(2)
    assert work.products_of(([torch.ones(2, dtype=torch.int64), half], {"bias": wide})) == torch.float16
    assert work.products_of((wide, {"dtype": torch.bfloat16})) == torch.bfloat16
    assert work.products_of((1, None)) is None


def test_packed_weights_are_read_in_the_place_of_the_others():
    prepared = kernels.prepare_conv(torch.randn(32, 32, 3, 3), padding=1, height=4, width=4)
    x = torch.randn(2, 32, 4, 4)
    given = (x, None, *prepared[:6], prepared.padding, prepared.dtype, None, None, None, False, None, None, None)
    bytes_ = work.bytes_of_call(torch.ops.cmfast.conv2d.default, ((*given, False, False, None), {}), (x.clone(),))
    assert bytes_ == 2 * 4 * x.numel() + prepared.packed.nbytes

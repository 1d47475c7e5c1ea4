"""How planned launches become steps and memory: with kernels in Python, which say what they see."""

import pytest
import torch
from cmfast.kernels.triton import group_norm as triton_group_norm
from cmfast.kernels.triton.launch import Launch
from torch import nn

from cmfast.engine import Accelerator, capture
from cmfast.engine.cuda import launches
from cmfast.engine.cuda.convolutions import Convolutions
from cmfast.engine.cuda.rule import Rule
from cmfast.engine.cuda.served import kernels
from cmfast.engine.lower import lower
from cmfast.engine.passes import PASSES

from .device import DEVICE


class Kernel:
    """A function in the place of a kernel of Triton's."""

    def __init__(self, function):
        self.function, self.__name__ = function, function.__name__

    def __getitem__(self, grid):
        return lambda *arguments, num_warps, num_stages, **constants: self.function(*arguments, **constants)


def count_and_sum(x, sums, ticket, groups, *, STEP):
    assert ticket.eq(0).all(), "a counter is not left at zero"
    ticket.add_(STEP)
    grouped = x.float().reshape(len(x), groups, -1)
    sums[0].copy_(grouped.mean(2))
    sums[1].copy_(grouped.var(2, unbiased=False))


def normalise(x, mean, var, ticket, y, weight, bias, mean_out, rstd, eps):
    assert ticket.eq(3).all()
    ticket.zero_()
    mean_out.copy_(mean)
    rstd.copy_((var + eps).rsqrt())
    groups = mean.shape[1]
    wide = (x.float().reshape(len(x), groups, -1) - mean[..., None]) * rstd[..., None]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    y.copy_(wide.reshape(x.shape) * weight.reshape(shape) + bias.reshape(shape))


def plan_group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu, *, arch=None):
    sums = h.new_empty((2, len(h), num_groups), dtype=torch.float32)
    ticket = h.new_zeros(5, dtype=torch.int32)
    y, mean, rstd = torch.empty_like(h), torch.empty_like(sums[0]), torch.empty_like(sums[0])
    return [
        Launch(Kernel(count_and_sum), (1,), (h, sums, ticket, num_groups), {"STEP": 3}),
        Launch(Kernel(normalise), (1,), (h, sums[0], sums[1], ticket, y, weight, bias, mean, rstd, eps), {}),
    ], (y, mean, rstd)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)

    def forward(self, x):
        return self.second(self.first(x).exp())


@pytest.fixture
def _plans_in_python(monkeypatch):
    monkeypatch.setattr(triton_group_norm, "plan_group_norm", plan_group_norm)


def lowered(module, *inputs, dtype=torch.float32):
    graph = capture(module.eval(), inputs)
    for rewrite in PASSES.values():
        rewrite(graph)
    return lower(graph, kernels(DEVICE, dtype, "sm_90", Convolutions(DEVICE, dtype, "sm_90", None, Rule("sm_90"))))


@pytest.mark.usefixtures("_plans_in_python")
def test_launches_are_steps_and_what_they_write_has_memory():
    steps = lowered(Norms(), torch.zeros(2, 4, 3, 3))
    names = [step.operator for step in steps.steps]
    norm = ["group_norm (count_and_sum)", "group_norm (normalise)"]
    assert names == [*norm, "aten.exp", *norm]
    h, sums, ticket, _ = steps.steps[0].arguments
    assert (steps.buffer(sums).first, steps.buffer(sums).last) == (0, 1)
    assert (steps.buffer(h).first, steps.buffer(h).last) == (-1, 1)
    y = steps.steps[1].arguments[4]
    assert (steps.buffer(y).first, steps.buffer(y).last) == (1, 2)
    assert [buffer.base.shape for buffer in steps.counters] == [(5,), (5,)]
    assert steps.buffer(ticket) is steps.counters[0]
    assert not set(steps.counters) & set(steps.buffers)


@pytest.mark.usefixtures("_plans_in_python")
@torch.no_grad()
def test_counters_are_zero_at_first_and_no_one_elses():
    net, x = Norms().eval().to(DEVICE), torch.randn(2, 4, 3, 3, device=DEVICE)
    fast = Accelerator(net, torch.float32)
    for _ in range(3):
        torch.testing.assert_close(fast(x), net(x))
    executable = fast.executable([x])
    assert [timed.step for timed in executable.time([x]).steps] == executable.steps.steps
    assert executable.bytes >= sum(buffer.bytes for buffer in executable.steps.counters)


@torch.no_grad()
def test_rows_that_the_kernels_cannot_read_are_copied():
    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x, rows):
            scale, shift = rows[..., 0], rows[..., 1]
            return torch.exp(self.norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    net = Film().eval().to(DEVICE)
    x, rows = torch.randn(2, 4, 3, 3, device=DEVICE), torch.randn(2, 4, 2, device=DEVICE)
    fast = Accelerator(net, torch.float32)
    torch.testing.assert_close(fast(x, rows), net(x, rows))
    steps = fast.executable([x, rows]).steps.steps
    assert [s.reason for s in steps if s.operator == "aten.clone"] == ["a row's elements are not adjacent"] * 2


@torch.no_grad()
def test_what_has_no_kernel_says_so():
    class Attend(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    steps = lowered(Attend(), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8))
    assert [s.reason for s in steps.steps] == ["the head size is 8, and the Triton kernels have tiles for 16 to 128"]
    steps = lowered(nn.LayerNorm(8), torch.zeros(2, 3, 8))
    assert [(s.operator, s.reason) for s in steps.steps] == [("channel_norm", "")]


def test_a_stand_in_has_no_memory_to_speak_of():
    found = launches.stand_in(torch.empty(1000, 1000, dtype=torch.bfloat16, device="meta"), DEVICE)
    assert (found.shape, found.dtype, found.untyped_storage().nbytes()) == ((1000, 1000), torch.bfloat16, 2)

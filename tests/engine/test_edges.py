"""Networks at the edges of what the engine has kernels for: each computes what it computes without the engine."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast.engine import CaptureError, capture
from cmfast.engine.cpu import target
from cmfast.engine.patterns import identities


class Net(nn.Module):
    """A convolution, a norm and another convolution, between which `work` does what a test is about."""

    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.n = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.l, self.m = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.g = nn.Parameter(torch.randn(8))
        self.work = work
        self.bn.running_mean.normal_()

    def forward(self, x):
        return self.work(self, x)


def images(n=2, size=6):
    return torch.randn(n, 8, size, size, generator=torch.Generator().manual_seed(n))


def same(net, *inputs, **options):
    net.eval()
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        fast = cmfast.accelerate(net, **options)
        for x, e in zip(inputs, expected, strict=True):
            found = fast(x)
            assert found.dtype == e.dtype
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-4)


def error_with_images_of_bfloat16(work, monkeypatch):
    """Relative, of a network whose images are bfloat16 between layers, as on a processor with AMX."""
    monkeypatch.setattr(target, "images", lambda products: torch.bfloat16)
    net = Net(work).eval()
    with torch.no_grad():
        expected = net(images())
        found = cmfast.accelerate(net, dtype=torch.bfloat16)(images())
    return (found - expected).norm() / expected.norm()


GIVEN_UP = {
    "projections without biases": lambda s, x: torch.cat(
        [s.m(x.mean((2, 3))), s.m(x.mean((2, 3))) + s.l(x.mean((2, 3)))]
    ),
    "a number added": lambda s, x: s.b(x) + 1,
    "a batch norm": lambda s, x: s.bn(s.b(x)),
    "scale and shift": lambda s, x: s.c(x) * 2 + 1,
    "a weight computed": lambda s, x: F.conv2d(x, s.w * s.g[:, None, None, None], padding=1),
}


@pytest.mark.parametrize("work", GIVEN_UP.values(), ids=GIVEN_UP)
def test_weights_that_were_given_up_serve_other_shapes(work):
    plain = Net(work).eval()
    with torch.no_grad():
        expected = [plain(x) for x in (images(2), images(1), images(2, 8))]
        fast = cmfast.accelerate(Net(work), keep_weights=False)
        for x, e in zip((images(2), images(1), images(2, 8)), expected, strict=True):
            torch.testing.assert_close(fast(x), e, rtol=1e-4, atol=1e-4)


def film(s, x):
    y = s.c(x)
    return s.d(F.silu(s.n(y) * (1 + y.mean((2, 3))[:, :, None, None])))


ROWS = {
    "FiLM by what was pooled": film,
    "an addition of it": lambda s, x: s.d(F.silu(s.n((y := s.c(x)) + F.adaptive_avg_pool2d(y, 1)))),
    "FiLM of a norm of the channels": lambda s, x: s.d(
        F.layer_norm((y := s.c(x)).movedim(1, -1), (8,)).movedim(-1, 1) * (1 + y.mean((2, 3))[:, :, None, None])
    ),
    "a norm whose weight was computed": lambda s, x: F.group_norm((y := s.c(x)), 2, y.mean((0, 2, 3))),
    "a bias that was computed": lambda s, x: F.conv2d((y := s.c(x)), s.w, y.mean((0, 2, 3)), padding=1),
}


@pytest.mark.parametrize("work", ROWS.values(), ids=ROWS)
def test_rows_of_images_of_bfloat16(work, monkeypatch):
    """The kernels read them as float32."""
    assert error_with_images_of_bfloat16(work, monkeypatch) < 0.03


FLOAT32_ALONE = {
    "rfft": lambda s, x: torch.fft.rfft(s.c(x)).abs(),
    "inverse": lambda s, x: torch.linalg.inv(s.c(x) + 9 * torch.eye(6)),
    "singular values": lambda s, x: torch.linalg.svdvals(s.c(x)),
    "distances": lambda s, x: torch.cdist(s.c(x), s.d(x)),
    "antialias": lambda s, x: F.interpolate(s.c(x), size=4, mode="bilinear", antialias=True),
    "complex": lambda s, x: torch.view_as_real(torch.view_as_complex(s.c(x).unflatten(3, (3, 2)).contiguous()) * 1j),
}


@pytest.mark.parametrize("work", FLOAT32_ALONE.values(), ids=FLOAT32_ALONE)
def test_what_torch_lacks_in_bfloat16_is_computed_in_float32(work, monkeypatch):
    assert error_with_images_of_bfloat16(work, monkeypatch) < 0.05


class Memory(nn.Module):
    """A part that gives its buffer away, which its caller writes to."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("state", torch.zeros(2, 8, 6, 6))

    def forward(self, x):
        return self.c(x), self.state


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.memory, self.d = Memory(), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y, state = self.memory(x)
        out = self.d(y + state)
        state.copy_(y * float(x.sum()))  # whose value is read: the network is run by its parts
        return out


def test_a_buffer_that_a_part_returns_is_the_buffer():
    plain, net = Remembering().eval(), Remembering().eval()
    with torch.no_grad():
        fast = cmfast.accelerate(net)
        for n in (2, 2, 2):
            torch.testing.assert_close(fast(images(n)), plain(images(n)), rtol=1e-4, atol=1e-4)
    assert net.memory.state.abs().sum() > 0


LAID = {
    "complex numbers": lambda s, x: torch.view_as_real(torch.view_as_complex(s.c(x).unflatten(3, (3, 2)).contiguous())),
    "complex tokens": lambda s, x: torch.view_as_complex(
        s.l(x.flatten(2).mT).mT.contiguous().unflatten(2, (18, 2))
    ).abs(),
    "elements of another kind": lambda s, x: s.c(x).contiguous().view(torch.int16),
    "distances of rows": lambda s, x: F.pdist(s.l(x.mean((2, 3))).t().contiguous()),
    "an exponential": lambda s, x: torch.matrix_exp(s.c(x) * 0.1),
}


@pytest.mark.parametrize("work", LAID.values(), ids=LAID)
def test_operators_that_read_memory_as_it_lies(work):
    if "int16" in work.__code__.co_names:
        net = Net(lambda s, x: work(s, x).view(torch.float32))
    else:
        net = Net(work)
    same(net, images())


NOTHING = {
    "a convolution": lambda s, x: torch.cat([s.c(x[:0]), s.c(x)]),
    "a linear layer": lambda s, x: torch.cat([s.l(x[:0].mean((2, 3))), s.l(x.mean((2, 3)))]),
    "a norm": lambda s, x: torch.cat([s.n(s.c(x[:0])), s.c(x)]),
    "tokens": lambda s, x: torch.cat([s.l(x[:, :, :0, 0].mT), s.l(x[:, :, :, 0].mT)], 1),
}


@pytest.mark.parametrize("work", NOTHING.values(), ids=NOTHING)
def test_intermediate_values_without_elements(work):
    same(Net(work), images())


INDICES = {
    "a list": lambda s, x: s.c(x)[:, [2, 1, 0]],
    "written": lambda s, x: _written(s.c(x)),
}


def _written(y):
    y = y.clone()
    y[:, [0, 1]] = 0.0
    return y


@pytest.mark.parametrize("work", INDICES.values(), ids=INDICES)
def test_indices_in_lists(work):
    same(Net(work), images())


ODD = {
    "a norm of one dimension": lambda s, x: s.c(x) * F.layer_norm(s.g, (8,))[:, None, None],
    "a transposed number": lambda s, x: s.c(x) * s.g.sum().t(),
    "a softmax of a number": lambda s, x: s.c(x) * s.g.sum().softmax(0),
    "a pool of no batch": lambda s, x: s.c(x) + F.avg_pool1d(x[0], 2).mean(),
    "attention of whole numbers": lambda s, x: (
        ((x[:, 0].round().long() * 0.125) @ s.c(x)[:, 0].mT).softmax(-1) @ s.c(x)[:, 1]
    ),
}


@pytest.mark.parametrize("work", ODD.values(), ids=ODD)
def test_shapes_and_kinds_that_are_rare(work):
    same(Net(work), images())


WHERE = {
    "the kind": lambda s, x: s.d(s.c(x)) if x.device.type == "cpu" else s.c(x),
    "a value's": lambda s, x: s.c(x) if s.c(x).is_meta else s.d(s.c(x)),
    "on the CPU": lambda s, x: s.d(s.c(x)) if x.is_cpu and not x.is_cuda else s.c(x),
    "the number": lambda s, x: s.d(s.c(x)) + x.get_device(),
    "that of a weight": lambda s, x: s.d(s.c(x)) if s.c.weight.device == x.device else s.c(x),
    "made there": lambda s, x: (
        s.c(x)
        + torch.zeros(6, device=x.device)
        + torch.arange(6, device=str(x.device))
        + x.new_ones(6, device=x.device)
    ),
    "numbers there": lambda s, x: s.c(x) * torch.tensor([0.0, 1, 2, 3, 4, 5], device=x.device),
}


@pytest.mark.parametrize("work", WHERE.values(), ids=WHERE)
def test_networks_that_ask_where_their_inputs_are(work):
    same(Net(work), images())


def test_values_that_are_moved_to_where_they_are_are_not_copied():
    graph = capture(Net(lambda s, x: s.d(s.c(x).to(x.device).cpu()).to(x.device, x.dtype)), [images()])
    assert list(graph.calls(torch.ops.aten._to_copy.default))
    identities.recognise(graph)
    assert not list(graph.calls(torch.ops.aten._to_copy.default))


def test_outputs_have_the_dtype_of_each_call():
    net = Net(lambda s, x: s.c(x.float()).to(torch.bfloat16)).eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16):
            assert fast(images().to(dtype)).dtype == net(images().to(dtype)).dtype


def test_what_only_a_capture_breaks_is_said_to_be_that():
    net = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.weight * float(x.numpy()[0, 0, 0, 0])

    with torch.no_grad(), pytest.raises(CaptureError):
        cmfast.accelerate(Read())(images())
    with pytest.raises(RuntimeError, match="expected input"):  # the network's own
        cmfast.accelerate(net)(torch.ones(1, 3, 6, 6))


@dataclasses.dataclass
class Counted:
    a: torch.Tensor
    d: int = dataclasses.field(default=0, init=False)


def test_arguments_that_cannot_be_made_again_are_refused():
    net = Net(lambda s, o: s.c(o.a) * o.d)
    with torch.no_grad(), pytest.raises(CaptureError, match="fields that its __init__ does not take"):
        cmfast.accelerate(net)(Counted(images()))

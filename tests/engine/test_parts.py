"""Networks that cannot be captured as a whole: their own forward runs, with the largest parts accelerated."""

import copy
import logging
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast.engine import CaptureError
from cmfast.engine.accelerator import accelerator_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gain = 1.0

    def forward(self, x, shift=None):
        h = self.conv(F.silu(self.norm(x)))
        return x + h * self.gain if shift is None else x + h * self.gain + shift


class Stage(nn.Module):
    """Its course depends on values where it is told so; its blocks' does not."""

    def __init__(self, chooses):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.drop = nn.Dropout(0.5)
        self.chooses = chooses

    def forward(self, x):
        for block in self.blocks:
            x = block(x, shift=torch.tensor(0.5))
        x = self.drop(x)
        return -x if self.chooses and x.sum() > 0 else x


class Net(nn.Module):
    """Draws noise, and has one stage that can be captured and one that cannot."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Conv2d(3, 8, 1)
        self.first, self.second = Stage(False), Stage(True)
        self.calls = 0

    def forward(self, x, scale=0.1):
        self.calls += 1
        h = self.head(x) + scale * torch.randn(x.shape[0], 8, *x.shape[2:])
        return {"y": self.second(self.first(h)), "calls": self.calls}


X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    return Net().eval()


def call(m, *args, **kwargs):
    torch.manual_seed(7)
    with torch.no_grad():
        return m(*args, **kwargs)["y"]


def served(fast):
    """The parts that the engine evaluates."""
    parts = accelerator_of(fast)._parts._parts
    return {part.name for part in parts.values() if part.accelerated._made.programs}


def test_the_largest_parts_are_accelerated(net, caplog):
    fast = cmfast.accelerate(net)
    with caplog.at_level(logging.WARNING, "cmfast.engine"):
        for _ in range(3):
            torch.testing.assert_close(call(fast, X), call(net, X), **CLOSE)
            torch.testing.assert_close(call(fast, X[:1]), call(net, X[:1]), **CLOSE)
    assert served(fast) == {"first", "second.blocks.0", "second.blocks.1"}
    left = accelerator_of(fast).left
    assert set(left) == {"", "second"}
    assert "draws random numbers" in left[""]
    assert "reads the values of tensors" in left["second"]
    logged = sorted(r.getMessage() for r in caplog.records)
    assert len(logged) == 2
    assert logged[0].startswith("Net is not accelerated as a whole, its parts are: the network draws random numbers")
    assert logged[1].startswith("second of Net is not accelerated as a whole")


def test_the_given_network_is_left_as_it_was(net):
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    net.train()
    fast = cmfast.accelerate(net)
    call(fast, X)
    assert all(m.training for m in net.modules())
    net.eval()
    for name, m in net.named_modules():
        assert m.__dict__.keys() == before[name].keys()
        for key, value in m.__dict__.items():
            assert value is before[name][key] or key == "training", (name, key)
    assert fast.calls == 1  # one call is one forward, however often it was tried to capture it
    assert net.calls == 0
    assert accelerator_of(copy.deepcopy(fast)) is None
    y = net(X)["y"]
    assert y.requires_grad
    assert not fast(X)["y"].requires_grad


def test_what_the_forward_counts_it_counts(net):
    fast = cmfast.accelerate(net)
    assert [fast(X)["calls"] for _ in range(3)] == [1, 2, 3]


def _lora(m):
    torch.manual_seed(1)
    m.first.blocks[0].conv = nn.Sequential(m.first.blocks[0].conv, nn.Conv2d(8, 8, 1))


CHANGES = {
    "in place": lambda m: m.first.blocks[0].conv.weight.detach().mul_(2),
    "through data": lambda m: m.second.blocks[1].conv.weight.data.mul_(2),
    "of what torch runs": lambda m: m.head.weight.data.mul_(2),
    "attribute of a part": lambda m: setattr(m.second.blocks[0], "gain", 3.0),
    "attribute of what torch runs": lambda m: setattr(m.second, "chooses", False),
    "replaced part": lambda m: setattr(m, "second", Net(3).eval().first),
    "replaced in a list": lambda m: m.second.blocks.__setitem__(0, Net(3).eval().first.blocks[0]),
    "added part": lambda m: m.second.blocks.append(Net(3).eval().first.blocks[0]),
    "removed part": lambda m: m.second.blocks.__delitem__(1),
    "wrapped": _lora,
    "loaded": lambda m: m.load_state_dict(Net(3).state_dict()),
    "assigned": lambda m: m.load_state_dict(Net(3).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_at_the_next_call(net, change):
    fast = cmfast.accelerate(net)
    before = call(fast, X)
    change(net)
    # The first level of attributes is the result's own; below it, modules are shared.
    fast.__dict__["_modules"] = net._modules
    expected = call(net, X)
    for _ in range(2):
        torch.testing.assert_close(call(fast, X), expected, **CLOSE)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert served(fast)


def test_parents_set_attributes_of_parts():
    class Sets(Net):
        def forward(self, x, gain=1.0):
            for block in self.second.blocks:
                block.gain = gain
            return super().forward(x)

    net = Sets().eval()
    fast = cmfast.accelerate(net)
    for gain in (1.0, 2.0, 2.0, 0.5):
        torch.testing.assert_close(call(fast, X, gain), call(net, X, gain), **CLOSE)


def test_hooks_run_or_are_said(net):
    fast = cmfast.accelerate(net)
    plain = call(fast, X)
    seen = []
    for module in (net.second, net.second.blocks[0], net.head):  # torch runs it, the engine, and torch's own layer
        handle = module.register_forward_hook(lambda m, args, output: seen.append(m) or 2 * output)
        torch.testing.assert_close(call(fast, X), call(net, X), **CLOSE)
        assert seen == [module, module]
        handle.remove()
        seen.clear()
    handle = net.second.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(m))
    call(fast, X)
    assert len(seen) == 1
    handle.remove()
    handle = net.second.blocks[0].conv.register_forward_hook(lambda m, args, output: output + 1)
    with pytest.raises(RuntimeError, match="does not run the hooks of its submodules, and conv has one"):
        call(fast, X)
    handle.remove()
    torch.testing.assert_close(call(fast, X), plain, **CLOSE)


def test_errors_of_the_network_are_its_own(net):
    fast = cmfast.accelerate(net)
    call(fast, X)
    for wrong in (X[:, :2], X[0, 0, 0]):
        with pytest.raises(RuntimeError) as expected:
            call(net, wrong)
        with pytest.raises(RuntimeError) as found:
            call(fast, wrong)
        assert not isinstance(found.value, CaptureError)
        assert str(found.value) == str(expected.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        call(fast, X, nothing=1)
    torch.testing.assert_close(call(fast, X), call(net, X), **CLOSE)


def test_what_can_be_captured_is_captured_beside_it(net):
    class Sometimes(Net):
        def forward(self, x, noise):
            return super().forward(x) if noise else {"y": self.first(self.head(x))}

    net = Sometimes().eval()
    fast = cmfast.accelerate(net)
    for noise in (True, False, True, False):
        torch.testing.assert_close(call(fast, X, noise), call(net, X, noise), **CLOSE)
    assert len(accelerator_of(fast)._made.programs) == 1


def test_a_part_that_returns_its_input_is_torchs_own():
    class Keeps(Block):
        def forward(self, x):
            return x, super().forward(x)

    class Writes(Net):
        def __init__(self):
            super().__init__()
            self.keeps = Keeps()

        def forward(self, x):
            h = self.head(x) + 0.1 * torch.randn(x.shape[0], 8, *x.shape[2:])
            same, y = self.keeps(h)
            same += 1
            return {"y": y + h}

    net = Writes().eval()
    fast = cmfast.accelerate(net)
    torch.testing.assert_close(call(fast, X), call(net, X), **CLOSE)
    assert "view of an input" in accelerator_of(fast).left["keeps"]


def test_gradients_that_the_forward_takes():
    class Guided(Net):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = self.first(self.head(x)).square().sum()
                (g,) = torch.autograd.grad(loss, x)
            return super().forward(x.detach() - 0.01 * g)

    net = Guided().eval()
    fast = cmfast.accelerate(net)
    torch.testing.assert_close(call(fast, X), call(net, X), **CLOSE)
    assert "second.blocks.0" in served(fast)


def test_threads(net):
    """Two accelerated networks that share their modules, and the plain one with gradients, at the same time."""
    fast, other = cmfast.accelerate(net), cmfast.accelerate(net)

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = net.first, net.second, net.head

        def forward(self, x):
            return {"y": self.second(self.first(self.head(x)))}

    plain = Still()
    expected = call(plain, X)
    for m in (fast, other):
        m(X, scale=0.0)  # while modules are captured, they are of no use to others
    failed = []

    def run(m, gradients):
        for _ in range(12):
            y = m(X, scale=0.0)["y"] if m is not plain else m(X)["y"]
            if y.requires_grad != gradients or not torch.allclose(y, expected, **CLOSE):
                failed.append(m)

    threads = [threading.Thread(target=run, args=(m, m is plain)) for m in (fast, fast, other, plain)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert all(m._compiled_call_impl is None for m in net.modules())


def test_without_parts_or_weights_it_is_said():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) + torch.randn_like(x)

    for _ in range(2):
        with pytest.raises(CaptureError, match="draws random numbers"):
            cmfast.accelerate(Draws())(X)
    with pytest.raises(CaptureError, match="draws random numbers"):
        cmfast.accelerate(Net(), keep_weights=False)(X)


def test_forwards_that_keep_tensors():
    """What a forward keeps while it is captured has no data, and must not stay: its own forward runs then."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.table, self.seen, self.last = Block(2), None, [], {}

        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[-1]) * 2
            self.seen.append(x.mean())
            self.last["x"] = x
            return self.block(x * self.table.to(x.dtype), x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Keeps()

        def forward(self, x):
            return self.inner(x)

    net = Outer().eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        found = fast(X[:, :2]), fast(X[:, :2])
        assert [x.is_meta for x in (net.inner.table, *net.inner.seen, net.inner.last["x"])] == [False] * 4
        assert net.inner.last["x"].data_ptr() == X.data_ptr()
        for y in found:
            torch.testing.assert_close(y, net(X[:, :2]), **CLOSE)


def test_options_reach_the_parts(net, tmp_path):
    fast = cmfast.accelerate(net, torch.bfloat16, tune=True, cache=tmp_path)
    torch.testing.assert_close(call(fast, X), call(net, X), rtol=0.05, atol=0.1)
    assert {p.name for p in tmp_path.iterdir()} >= {"first", "second.blocks.0"}
    assert all((tmp_path / name / "forms.json").exists() for name in served(fast))

"""What people's networks do beside their arithmetic, and layers that are seldom in diffusion models."""

import collections
import copy
import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import cmfast
from cmfast.benchmarking.accuracy import relative_error
from cmfast.engine import accelerator
from cmfast.engine.capture import capture

from .networks import Net


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear():
    return nn.Linear(7, 7)


# ---- layers

X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1))


def with_moments(norm):
    """A norm whose running moments are not those that it begins with."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return norm


LAYERS = {
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(4, 6, 3), with_moments(nn.BatchNorm2d(6)), nn.ReLU()), X),
    "without weights": lambda: (nn.Sequential(nn.Conv2d(4, 6, 3), with_moments(nn.BatchNorm2d(6, affine=False))), X),
    "after a linear layer": lambda: (nn.Sequential(nn.Linear(4, 6), with_moments(nn.BatchNorm1d(6))), X[0, :, :, 0].mT),
    "instance norm": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), with_moments(nn.InstanceNorm2d(6, track_running_stats=True))),
        X,
    ),
    "batch norm first": lambda: (nn.Sequential(with_moments(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1)), X),
    "rms norm": lambda: (nn.Sequential(nn.Linear(7, 7), nn.RMSNorm(7)), X),
    "rms norm of two dimensions": lambda: (nn.Sequential(nn.Linear(7, 7), nn.RMSNorm((9, 7), eps=1e-6)), X),
    "valid, 1-D": lambda: (nn.Conv1d(4, 6, 3, padding="valid"), X[..., 0]),
    "valid, 2-D": lambda: (nn.Conv2d(4, 6, 3, padding="valid"), X),
    "valid, 3-D": lambda: (nn.Conv3d(4, 6, 3, padding="valid"), X[:, :, None].repeat(1, 1, 4, 1, 1)),
    "encoder layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
    "multi-head attention": lambda: (
        Net(lambda m, x: m.attend(x, x, x, need_weights=False)[0], attend=nn.MultiheadAttention(8, 2)),
        torch.randn(5, 2, 8),
    ),
    "embedding bag": lambda: (nn.EmbeddingBag(9, 7), torch.tensor([[1, 8, 2], [0, 0, 3]])),
    "conjugate": lambda: (
        Net(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(m.conv(x)).conj() * torch.fft.rfft(x)), conv=nn.Conv2d(4, 4, 1)
        ),
        X,
    ),
    "imaginary": lambda: (
        Net(lambda m, x: torch.view_as_real(torch.fft.rfft(m.l(x)).conj().resolve_conj()), l=linear()),
        X,
    ),
    "imaginary part": lambda: (Net(lambda m, x: torch.fft.rfft(m.l(x)).conj().imag, l=linear()), X),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    net, x = LAYERS[name]()
    net.eval()
    with torch.no_grad():
        expected, found = net(x), cmfast.accelerate(net)(x)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["batch norm", "without weights"])
def test_a_batch_norm_is_in_the_convolution_before_it(name):
    net, x = LAYERS[name]()
    explanation = cmfast.explain(cmfast.accelerate(net.eval()), x)
    assert not explanation.torch
    net[1].running_var.mul_(2)  # the convolution's weights are made anew
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        fast(x)
        net[1].running_mean.add_(1)
        assert relative_error(fast(x), net(x)) < 1e-5


@pytest.mark.parametrize("name", ["encoder layer", "multi-head attention"])
def test_torchs_own_attention_layers_are_served(name):
    net, x = LAYERS[name]()
    assert cmfast.explain(cmfast.accelerate(net.eval()), x).kernels["attention"] == 1


class NamesItsDtype(nn.Module):
    """As guided-diffusion's network after convert_to_fp16."""

    def __init__(self, dtype):
        super().__init__()
        self.l, self.dtype = nn.Linear(7, 7).to(dtype), dtype

    def forward(self, x):
        return self.l(x.type(self.dtype)).type(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_networks_that_name_their_dtype(dtype):
    net, x = NamesItsDtype(dtype).eval(), X
    fast = cmfast.accelerate(net, dtype=torch.float32)
    with torch.no_grad():
        expected, found = net(x), fast(x)
        exact = copy.deepcopy(net).l.float()(x)
    assert found.dtype == expected.dtype == torch.float32
    assert relative_error(found, exact) < 1e-5


# ---- what else a forward does


def counts(m, x):
    m.i += 1
    return m.l(x) * m.i


def averages(m, x):
    m.ema = 0.9 * m.ema + x.mean((0, 1, 2))
    return m.l(x) - m.ema


def remembers(m, x):
    y = m.l(x)
    if m.kept is None:
        m.kept = y
    return y + m.kept


def keeps_history(m, x):
    m.history.append(x.mean())
    return m.l(x) * len(m.history)


def keeps_a_set(m, x):
    m.seen.add(len(m.seen))
    return m.l(x) * len(m.seen)


def keeps_by_shape(m, x):
    if x.shape not in m.tables:
        m.tables[x.shape] = m.l(x)
    return m.l(x) + m.tables[x.shape]


def with_buffer():
    net = Net(averages, l=linear())
    net.register_buffer("ema", torch.zeros(7))
    return net


STATES = {
    "counts": lambda: Net(counts, l=linear(), i=0),
    "averages": with_buffer,
    "remembers": lambda: Net(remembers, l=linear(), kept=None),
    "keeps a deque": lambda: Net(keeps_history, l=linear(), history=collections.deque(maxlen=3)),
    "keeps a set": lambda: Net(keeps_a_set, l=linear(), seen=set()),
    "keeps an ordered dict": lambda: Net(keeps_by_shape, l=linear(), tables=collections.OrderedDict()),
    "in a part": lambda: nn.Sequential(Net(counts, l=linear(), i=0), nn.Sequential(linear(), nn.SiLU())),
}


@pytest.mark.parametrize("name", STATES)
def test_a_forward_that_keeps_state(name):
    net = STATES[name]().eval()
    fast = cmfast.accelerate(copy.deepcopy(net))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn_like(X)
            assert relative_error(fast(x), net(x)) < 1e-5


def test_a_forward_that_always_keeps_state_is_captured_twice_at_most(monkeypatch):
    captures = []
    monkeypatch.setattr(accelerator, "capture", lambda *a: (captures.append(1), capture(*a))[1])
    fast = cmfast.accelerate(STATES["counts"]().eval())
    with torch.no_grad():
        for _ in range(4):
            fast(X)
    assert len(captures) == 2


def test_what_is_computed_once_is_captured_after_that():
    net = Net(lambda m, x: m.l(x) + frequencies(m), l=nn.Sequential(linear(), linear()), kept=None).eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        expected = net.l(X) + torch.arange(7)
        assert relative_error(fast(X), expected) < 1e-5
        assert relative_error(fast(X), expected) < 1e-5
        assert not cmfast.explain(fast, X).left


def frequencies(m):
    if m.kept is None:
        m.kept = torch.arange(7.0)
    return m.kept


def test_lists_and_dicts_of_a_call_are_written_to():
    def forward(m, x, features, extra):
        y = m.l(x)
        features.append(y)
        extra["y"] = y
        return y

    net = Net(forward, l=linear()).eval()
    features, extra = [], {}
    with torch.no_grad():
        found = cmfast.accelerate(net)(X, features, extra)
    assert features[0] is extra["y"] is found


class Doubled(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


def test_a_class_with_a_call_of_its_own():
    net = Doubled(7, 7).eval()
    with torch.no_grad():
        assert relative_error(cmfast.accelerate(net)(X), net(X)) < 1e-5
        outer = nn.Sequential(net, nn.SiLU())
        assert relative_error(cmfast.accelerate(outer)(X), outer(X)) < 1e-5


def test_a_defaultdict_is_returned():
    def forward(m, x):
        found = collections.defaultdict(list)
        found["y"] = m.l(x)
        return found

    found = cmfast.accelerate(Net(forward, l=linear()).eval())(X)
    assert type(found) is collections.defaultdict
    assert found["none"] == []
    assert found["y"].shape == X.shape


# ---- what changes


def scaled(m, x):
    return m.l(x) * m.numbers.inner.scale


def changed_class(net):
    class Patched(type(net.l)):
        def forward(self, x):
            return 3 * super().forward(x)

    net.l.__class__ = Patched


class Lora(nn.Module):
    """As kohya's: it takes the place of a layer's forward, and is no part of the network."""

    def __init__(self, layer):
        super().__init__()
        self.down, self.up, self.multiplier = nn.Linear(7, 2), nn.Linear(2, 7), 1.0
        self.before = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        return self.before(x) + self.multiplier * self.up(self.down(x))


def with_lora():
    net = Net(lambda m, x: m.l(x), l=linear())
    net.lora = weakref.ref(Lora(net.l))  # which the layer's forward alone holds
    return net


def with_closure():
    scale = {"by": torch.ones(7)}
    net = Net(lambda m, x: m.l(x), l=linear())
    forward = net.l.forward
    net.l.forward = lambda x: forward(x) * scale["by"]
    net.change = functools.partial(scale.__setitem__, "by")
    return net


def in_list(m, x):
    return m.layers[0](x) * m.tensors[0] * m.pair[1] * m.nested["a"]["b"][0] * m.numbers[0][0]


CHANGES = {
    "class": (lambda: Net(lambda m, x: m.l(x), l=linear()), changed_class),
    "attribute of an object of an object": (
        lambda: Net(scaled, l=linear(), numbers=Box(inner=types.SimpleNamespace(scale=2.0))),
        lambda net: setattr(net.numbers.inner, "scale", 3.0),
    ),
    "LoRA's multiplier": (with_lora, lambda net: setattr(net.lora(), "multiplier", 3.0)),
    "LoRA's weight": (with_lora, lambda net: net.lora().up.weight.mul_(3)),
    "of a closure": (with_closure, lambda net: net.change(torch.full((7,), 3.0))),
    "tuple of large tensors": (
        lambda: nn.Sequential(Net(lambda m, x: m.l(x) * m.pair[0].mean(), l=linear(), pair=(torch.ones(5000),))),
        lambda net: setattr(net[0], "pair", (torch.cat([torch.ones(100), torch.full((4900,), 2.0)]),)),
    ),
    "weight of a module in a list": (lambda: lists(), lambda net: net.layers[0].weight.data.mul_(2)),
    "module in a list": (lambda: lists(), lambda net: net.layers.__setitem__(0, linear())),
    "tensor in a list": (lambda: lists(), lambda net: net.tensors[0].mul_(2)),
    "tensor in a tuple": (lambda: lists(), lambda net: net.pair[1].mul_(2)),
    "in a list in a dict in a dict": (lambda: lists(), lambda net: net.nested["a"]["b"].__setitem__(0, 5.0)),
    "number in a list in a list": (lambda: lists(), lambda net: net.numbers[0].__setitem__(0, 5.0)),
}


class Box:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def lists():
    pair, nested = (1, torch.ones(7)), {"a": {"b": [2.0]}}
    return Net(in_list, layers=[linear()], tensors=[torch.ones(7)], pair=pair, nested=nested, numbers=[[2.0]])


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_what_is_nested_are_noticed(name):
    make, change = CHANGES[name]
    net = make().eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        before = fast(X)
        assert relative_error(before, net(X)) < 1e-5
        change(net)
        assert relative_error(net(X), before) > 0.1
        assert relative_error(fast(X), net(X)) < 1e-5


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_captured_once_for_a_change(name, monkeypatch):
    captures = []
    monkeypatch.setattr(accelerator, "capture", lambda *a: (captures.append(1), capture(*a))[1])
    make, change = CHANGES[name]
    net = make().eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        for expected in (1, 2):
            for _ in range(3):
                fast(X)
            assert len(captures) == expected
            change(net)


def test_a_network_that_changes_at_each_call_is_warned_of(caplog):
    net = Net(lambda m, x: m.l(x), l=linear(), state=Box(step=0)).eval()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        for i in range(9):
            net.state.step = i
            assert relative_error(fast(X), net(X)) < 1e-5
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Net was captured anew at 4 calls in a row")
    assert said.endswith("what has changed is step of Box")


def freed():
    x = torch.ones(9)
    x.untyped_storage().resize_(0)
    return x


UNREAD = {
    "freed": freed,
    "without data": lambda: FakeTensorMode().from_tensor(torch.ones(9)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "uninitialised": nn.UninitializedParameter,
    "zeros without memory": lambda: torch._efficientzerotensor(9),
}


def test_what_weak_proxies_are_of_may_be_gone():
    net = Net(lambda m, x: m.l(x), l=linear()).eval()
    net.__dict__["of"] = weakref.proxy(Box())  # nn.Module itself cannot set it
    with torch.no_grad():
        assert relative_error(cmfast.accelerate(net)(X), net(X)) < 1e-5


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_every_kind_may_lie_in_a_network(name):
    net = Net(lambda m, x: m.l(x), l=linear()).eval()
    net.__dict__["unread"] = UNREAD[name]()
    fast = cmfast.accelerate(net)
    with torch.no_grad():
        assert relative_error(fast(X), net(X)) < 1e-5
        net.l.weight.mul_(2)
        assert relative_error(fast(X), net(X)) < 1e-5


# ---- torch's own tools


def pair():
    net = nn.Sequential(linear(), nn.SiLU(), linear()).eval()
    return net, cmfast.accelerate(net)


def exported(fast, x):
    return torch.export.export(fast, (x,)).module()


RECORDERS = {
    "make_fx": lambda fast, x: make_fx(fast)(x),
    "torch.export": exported,
    "jit.trace": torch.jit.trace,
}


@pytest.mark.parametrize("name", RECORDERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_records_operators_records_the_networks_own(name):
    net, fast = pair()
    x, y = torch.randn(2, 3, 7)
    with torch.no_grad():
        fast(x)
        assert torch.equal(RECORDERS[name](fast, x)(y), net(y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    net, _ = pair()
    with pytest.raises(TypeError, match="expected a network of Python, got a TopLevelTracedModule"):
        cmfast.accelerate(torch.jit.trace(net, X))


def test_graph_modules():
    net, _ = pair()
    with torch.no_grad():
        for graph in (torch.fx.symbolic_trace(net), exported(net, X)):
            assert relative_error(cmfast.accelerate(graph)(X), net(X)) < 1e-5


def test_hooks_of_all_modules_are_refused():
    _, fast = pair()
    fast(X)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="does not run the hooks of all modules"):
            fast(X)
    finally:
        handle.remove()
    fast(X)


def test_a_context_of_another_device_does_not_matter():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad(), torch.device("meta"):
        for dtype in (torch.float32, torch.bfloat16):
            fast = cmfast.accelerate(net, dtype=dtype)
            first = fast(X)
            assert torch.equal(fast(X), first)
            assert relative_error(first, net(X)) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_parametrisations_that_are_kept_have_their_data():
    net = nn.Sequential(parametrizations.weight_norm(linear()), nn.SiLU()).eval()
    with torch.no_grad():
        expected = net(X)
        with parametrize.cached():
            assert relative_error(cmfast.accelerate(net)(X), expected) < 1e-5
            assert not net[0].weight.is_meta
            assert torch.equal(net(X), expected)


def test_heads_in_any_number_of_dimensions():
    net = Net(lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x), l=linear()).eval()
    for x in (X, X[0], X[0, 0], X[None]):
        fast = cmfast.accelerate(net)
        with torch.no_grad():
            assert relative_error(fast(x), net(x)) < 1e-5
        assert cmfast.explain(fast, x).kernels["attention"] == 1

"""torch.compile(network, backend="cmfast"): the same values as without it, whatever happens to the weights."""

import gc
import logging
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cmfast.engine import accelerator, dynamo

from .networks import network

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """The engine's calls, each as the accelerator that served it."""
    calls = []

    class Counted(accelerator.Accelerator):
        def __call__(self, *args, **kwargs):
            outputs = super().__call__(*args, **kwargs)
            calls.append(self)
            return outputs

    monkeypatch.setattr(dynamo, "Accelerator", Counted)
    dynamo._say.cache_clear()
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


class Net(nn.Module):
    """A small network with parameters, buffers and a plain tensor among its attributes."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 5)
        self.register_buffer("gain", torch.rand(8) + 0.5)
        self.constant = torch.ones(5)
        self.factor = 2.0

    def forward(self, x, t=1.0, shift=None):
        gain = self.gain.to(x.device).to(x.device, x.dtype).to(device="cpu", dtype=x.dtype).cpu()
        h = F.silu(self.norm(self.conv(x) * t)).to(x.device) * gain[:, None, None]
        if shift is not None:
            h = h + shift["a"]
        return {"y": self.out(h.mean((2, 3))) * self.factor + self.constant, "h": h, "n": x.shape[0], "none": None}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(compiled, net, *args, **kwargs):
    found, expected = compiled(*args, **kwargs), net(*args, **kwargs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].stride() == value.stride()
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, **CLOSE)
        else:
            assert found[name] == value


def test_torch_lists_it():
    assert "cmfast" in torch._dynamo.list_backends()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_structure_and_layout(served, mode):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    with mode():
        check(compiled, net, draw(2, 3, 8, 8))
        check(compiled, net, draw(2, 3, 8, 8), shift={"a": draw(8, 1, 1)})
        check(compiled, net, draw(2, 8, 8, 3).permute(0, 3, 1, 2))
        check(compiled, net, draw(2, 3, 8, 16)[..., ::2], t=torch.tensor(0.5))
    assert len(served) == 4


@torch.no_grad()
def test_a_whole_network_is_what_accelerate_makes_of_it(served):
    unet, inputs = network("film", attention_resolutions=(2,))
    compiled = torch.compile(unet, backend="cmfast", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), unet(*inputs), **CLOSE)
    (program,) = served[0]._made.programs.values()
    steps = accelerator.Accelerator(unet, torch.float32).executable(inputs).steps.steps
    assert Counter((s.operator, s.reason) for s in program.executable.steps.steps) == Counter(
        (s.operator, s.reason) for s in steps
    )


@pytest.mark.parametrize("dynamic", [True, None])
@torch.no_grad()
def test_batches_of_any_size(served, dynamic):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast", dynamic=dynamic)
    for n in (2, 3, 5, 3):
        x = draw(n, 3, 8, 8)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        check(compiled, net, x)
    assert len(served) == 4
    assert len(set(map(id, served))) == 1  # one graph; the weights are packed once
    weights = served[0].target.weights.packed
    assert len(weights) == 2


@torch.no_grad()
def test_numbers(served):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    for t in (1, 2, 3, 0.5, 0.25, 0.75, 0.5):
        check(compiled, net, draw(2, 3, 8, 8), t)
    assert len(served) == 7


CHANGES = {
    "in place": lambda m: m.conv.weight.mul_(2),
    "through data": lambda m: m.conv.weight.data.mul_(2),
    "one element": lambda m: m.conv.bias.data[1].add_(1),
    "other data": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2),
    "loaded": lambda m: m.load_state_dict(Net(3).state_dict()),
    "assigned": lambda m: m.load_state_dict(Net(3).state_dict(), assign=True),
    "new parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight * 2)),
    "new buffer": lambda m: setattr(m, "gain", m.gain * 3),
    "buffer": lambda m: m.gain.mul_(3),
    "new tensor": lambda m: setattr(m, "constant", m.constant * 3),
    "number": lambda m: setattr(m, "factor", 5.0),
    "module": lambda m: setattr(m, "conv", Net(3).conv),
    "wrapped": lambda m: setattr(m, "conv", nn.Sequential(m.conv, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_seen_at_the_next_call(served, change):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    x = draw(2, 3, 8, 8)
    check(compiled, net, x)
    before = net(x)["y"]
    change(net)
    check(compiled, net, x)
    check(compiled, net, x)
    assert len(served) == 3
    assert not torch.allclose(net(x)["y"], before, atol=1e-3)


def test_an_optimizer_steps(served):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    x = draw(2, 3, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            check(compiled, net, x)
        optimizer.zero_grad()
        net(x)["y"].square().sum().backward()
        optimizer.step()
    assert len(served) == 3


@torch.no_grad()
def test_modules_of_the_same_type_share_a_graph_and_not_their_weights(served):
    nets = [Net(seed).eval() for seed in range(3)]
    compiled = [torch.compile(net, backend="cmfast") for net in nets]
    for _ in range(3):
        for fast, net in zip(compiled, nets, strict=True):
            check(fast, net, draw(2, 3, 8, 8))
    assert len(served) == 9
    assert len(set(map(id, served))) == 3


@torch.no_grad()
def test_a_tensor_that_is_another_at_every_call_becomes_an_input(served):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    for i in range(5):
        net.constant = torch.full((5,), float(i))
        check(compiled, net, draw(2, 3, 8, 8))
    assert len(served) == 5
    assert len(set(map(id, served))) == 2


@torch.no_grad()
def test_replaced_parameters_are_not_kept(served):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    old = []
    for _ in range(3):
        old.append(weakref.ref(net.conv.weight))
        net.conv.weight = nn.Parameter(net.conv.weight * 1.5)
        check(compiled, net, draw(2, 3, 8, 8))
    assert len(set(map(id, served))) == 3
    served.clear()
    gc.collect()
    assert [ref() for ref in old] == [None] * 3


@torch.no_grad()
def test_graph_breaks(served):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Net(1), Net(2)

        def forward(self, x):
            h = self.first(x)["h"]
            torch._dynamo.graph_break()
            if h.sum() > 1e9:
                h = -h
            return self.second(h[:, :3])

    net = Broken().eval()
    compiled = torch.compile(net, backend="cmfast")
    for n in (1, 2):
        check(compiled, net, draw(n, 3, 8, 8))
    assert len(served) >= 4


def test_training_is_torchs_own(served, caplog):
    net = Net().eval()
    compiled = torch.compile(net, backend="cmfast")
    x = draw(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "cmfast"):
        for _ in range(2):
            compiled(x)["y"].square().sum().backward()
    found = net.conv.weight.grad / 2
    net.zero_grad()
    net(x)["y"].square().sum().backward()
    torch.testing.assert_close(found, net.conv.weight.grad)
    assert not served
    assert [r.getMessage() for r in caplog.records if "gradients are enabled" in r.getMessage()] != []
    assert len(caplog.records) == 1
    net.requires_grad_(False)
    check(compiled, net, x)
    assert len(served) == 1
    with torch.no_grad():
        net.requires_grad_(True)
        check(compiled, net, x)
    assert len(served) == 2


def test_gradients_within_no_grad_are_torchs_own(served):
    class Enables(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)["y"]

    net = Enables().eval()
    with torch.no_grad():
        assert torch.compile(net, backend="cmfast")(draw(2, 3, 8, 8)).requires_grad
    assert not served


class Noisy(Net):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Counts(Net):
    def forward(self, x):
        self.gain.add_(1)
        return super().forward(x)


class View(Net):
    def forward(self, x):
        return super().forward(x) | {"x": x.view(-1)}


class Views(Net):
    def forward(self, x):
        found = super().forward(x)
        return found | {"part": found["h"][:, 0]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Noisy, "draws random numbers"),
        (Counts, "writes in place"),
        (View, "view of an input or of another output"),
        (Views, "view of an input or of another output"),
    ],
)
@torch.no_grad()
def test_what_the_engine_cannot_run_torch_runs(served, caplog, kind, message):
    net, twin = kind().eval(), kind().eval()
    compiled = torch.compile(net, backend="cmfast")
    x = draw(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "cmfast"):
        for _ in range(3):
            torch.manual_seed(5)
            found = compiled(x)
            torch.manual_seed(5)
            torch.testing.assert_close(found, twin(x))
    assert not served
    assert [message in r.getMessage() for r in caplog.records] == [True]
    if kind is View:
        assert found["x"].data_ptr() == x.data_ptr()
    if kind is Views:
        assert found["part"].data_ptr() == found["h"].data_ptr()


@torch.no_grad()
def test_courses_that_torch_compiles_and_the_engine_does_not(served, caplog):
    class Chooses(Net):
        def forward(self, x):
            h = super().forward(x)["y"]
            return {"y": torch.cond(h.sum() > 0, lambda y: y + 1, lambda y: y - 1, (h,))}

    net = Chooses().eval()
    with caplog.at_level(logging.WARNING, "cmfast"):
        check(torch.compile(net, backend="cmfast"), net, draw(2, 3, 8, 8))
    assert not served
    assert "torch runs a graph of torch.compile's" in caplog.text


@torch.no_grad()
def test_other_devices_dtypes_and_autocast_are_torchs_own(served, caplog):
    with caplog.at_level(logging.WARNING, "cmfast"):
        compiled = torch.compile(nn.Conv2d(3, 4, 1, device="meta"), backend="cmfast")
        assert compiled(torch.empty(2, 3, 8, 8, device="meta")).is_meta
        assert "the CPU or on a GPU (CUDA or ROCm), and there are some on meta" in caplog.text
        net = Net().eval().double()
        check(torch.compile(net, backend="cmfast"), net, draw(2, 3, 8, 8).double())
        assert "is torch.float64" in caplog.text
        net = Net().eval()
        with torch.autocast("cpu", torch.bfloat16):
            check(torch.compile(net, backend="cmfast"), net, draw(2, 3, 8, 8))
        assert "under autocast" in caplog.text
    assert not served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_networks(served, dtype):
    net = Net().eval()
    net.constant = net.constant.to(dtype)
    expected = net(draw(2, 3, 8, 8))["h"]
    net.to(dtype)
    found = torch.compile(net, backend="cmfast")(draw(2, 3, 8, 8).to(dtype))["h"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    assert len(served) == 1


@torch.no_grad()
def test_options(served, tmp_path):
    net, x = Net().eval(), draw(2, 3, 8, 8)
    options = {"dtype": "bfloat16", "tune": True, "cache": tmp_path}
    found = torch.compile(net, backend="cmfast", options=options)(x)["h"]
    torch.testing.assert_close(found, net(x)["h"], rtol=0.05, atol=0.05)
    assert served[0].products == torch.bfloat16
    assert (tmp_path / "forms.json").exists()
    for wrong, message in [
        ({"options": {"fast": True}}, "options are dtype, tune, cache, got fast=True"),
        ({"options": {"dtype": "float16"}}, "dtype must be float32 or bfloat16, got torch.float16"),
        ({"options": {"dtype": "half-ish"}}, "dtype must be float32 or bfloat16, got half-ish"),
        ({"mode": "max-autotune"}, "has no modes, got mode='max-autotune'"),
    ]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(net, backend="cmfast", **wrong)(x)


@torch.no_grad()
def test_functions_and_weights_as_inputs(served):
    """A function's own arguments are inputs, also where they are weights; what it closes over is held."""
    net, w = Net().eval(), nn.Parameter(draw(3, 3, 1, 1))

    def function(x, weight):
        return net(F.conv2d(x, weight))["y"]

    compiled = torch.compile(function, backend="cmfast")
    for _ in range(2):
        torch.testing.assert_close(compiled(draw(2, 3, 8, 8), w), function(draw(2, 3, 8, 8), w), **CLOSE)
        w.mul_(2)
    assert len(served) == 2
    plain = torch.compile(lambda x: torch.sin(x) + 1, backend="cmfast")
    torch.testing.assert_close(plain(draw(3, 4)), torch.sin(draw(3, 4)) + 1)
    assert len(served) == 2


@torch.no_grad()
def test_parameters_within_graphs(served):
    """As other tracers keep them: attributes of the graph, not inputs."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.silu(self.conv(x)), None, 3

    net = Plain().eval()
    compiled = dynamo.backend(torch.fx.symbolic_trace(net), [])
    for _ in range(2):
        found, expected = compiled(draw(2, 3, 8, 8)), net(draw(2, 3, 8, 8))
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
        assert found[1:] == (None, 3)
        net.conv.weight.data.mul_(2)
    assert len(served) == 2


@torch.no_grad()
def test_a_scalar_of_numpys_is_served(served):
    """As diffusers' skip blocks have one; numbers of float64 that something is computed of are torch's."""
    net = Net().eval()
    net.factor = np.sqrt(2.0)
    check(torch.compile(net, backend="cmfast"), net, draw(2, 3, 8, 8))
    assert len(served) == 1

    class Wide(Net):
        def forward(self, x, t):
            return super().forward(x, t * 2 - 1)

    net = Wide().eval()
    check(torch.compile(net, backend="cmfast"), net, draw(2, 3, 8, 8), torch.tensor(0.3, dtype=torch.float64))
    assert len(served) == 1


class Moves(nn.Module):
    """A network that moves its values to where they are, in every way there is."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.register_buffer("weight", torch.empty(8, 3, 3, 3, device=device))
        self.register_buffer("gain", torch.empty(8, 1, 1, device=device))

    def forward(self, x):
        x = F.conv2d(x, self.weight).to(self.device).to(device=self.device, dtype=x.dtype).to(str(self.device))
        x = x.cpu() if self.device.type == "cpu" else x  # without CUDA, torch traces no cuda()
        return x * self.gain.to(self.device, x.dtype)


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
@torch.no_grad()
def test_graphs_of_one_device_are_the_engines(device, other):
    graphs = []

    def note(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        torch.compile(Moves(device), backend=note, fullgraph=True)(torch.empty(2, 3, 8, 8, device=device))
    (graph,) = graphs
    nodes = graph.graph.find_nodes(op="placeholder")
    assert dynamo._device(graph, nodes) == torch.device(device)
    assert dynamo._refusal(graph, nodes, torch.device(device)) == ""
    assert f"on one device, and there are some on {other} and {device}" in dynamo._refusal(
        graph, nodes, torch.device(other)
    )

    def moves(graph):
        """The devices that values are moved to."""
        calls = [node for node in graph.graph.nodes if node.op == "call_method" and node.target in ("to", "cpu")]
        given = [
            x for call in calls for x in ("cpu" if call.target == "cpu" else None, *call.args, *call.kwargs.values())
        ]
        return [str(x) for x in given if isinstance(x, str | torch.device)]

    assert set(moves(graph)) == {device}
    assert not moves(dynamo._without_moves(graph, torch.device(device)))
    assert moves(dynamo._without_moves(graph, torch.device(other))) == moves(graph)


@pytest.mark.parametrize(
    ("value", "device", "expected"),
    [
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        (torch.device("cuda"), "cuda:1", True),
        ("cpu", "cuda:1", False),
        ("cpu", "cpu", True),
        (torch.float32, "cpu", False),
        (None, "cpu", False),
    ],
)
def test_names_of_devices(value, device, expected):
    assert dynamo._names(value, torch.device(device)) == expected


def test_options_know_the_device():
    net, x = Net().eval(), draw(2, 3, 8, 8)
    with pytest.raises(Exception, match=r"must be float32 or bfloat16, got torch.float16, which GPUs alone serve"):
        torch.compile(net, backend="cmfast", options={"dtype": "float16"})(x)
    assert dynamo._settings(None, {"dtype": "float16"}, torch.device("cuda:0"))["dtype"] == torch.float16

"""Networks whose values, modes and surroundings are not the usual ones: dtypes, threads, autocast, random numbers."""

import argparse
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast import ConsistencyModel
from cmfast.engine.turns import Turns
from cmfast.preconditioning import EDM

from .networks import Net, error


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def conv(*sizes, **options):
    torch.manual_seed(1)
    return nn.Conv2d(*sizes, **options)


def block():
    """A part that is worth accelerating."""
    return nn.Sequential(conv(4, 32, 3, padding=1), nn.SiLU(), conv(32, 4, 3, padding=1))


def parameter(*shape, scale=1.0):
    return nn.Parameter(scale * seeded(*shape))


X, T, ROW = seeded(2, 4, 8, 8), seeded(2, 4), seeded(2, 4)
MASK = torch.ones(2, 1, 8, 8, dtype=torch.bool)


def image(row):
    return row[:, :, None, None]


#: Networks and inputs, whose results are torch's to rounding, and in its dtype.
NETWORKS = {
    "a mask of booleans beside the channels": (
        Net(lambda m, x, k: m.c(torch.cat([x, k], 1)), c=conv(5, 32, 3)),
        (X, MASK),
    ),
    "a norm of an image and a mask": (
        Net(lambda m, x, k: m.g(torch.cat([x, k, k, k, k], 1)), g=nn.GroupNorm(2, 8)),
        (X, MASK),
    ),
    "film of doubles": (Net(lambda m, x, s: F.silu(m.g(x) * (1 + image(s.double()))), g=nn.GroupNorm(2, 4)), (X, ROW)),
    "a shift of doubles": (Net(lambda m, x, s: m.g(x) + image(s.double()), g=nn.GroupNorm(2, 4)), (X, ROW)),
    "an addition of doubles": (Net(lambda m, x, s: m.g(x + image(s.half()).float()), g=nn.GroupNorm(2, 4)), (X, ROW)),
    "an image of integers and a row": (
        Net(lambda m, x, s: m.g((x * 9).int() + image(s)), g=nn.GroupNorm(2, 4)),
        (X, ROW),
    ),
    "film by small factors": (Net(lambda m, x, s: m.g(x) * image(s * 1e-6), g=nn.GroupNorm(2, 4)), (X, ROW)),
    "one channel that becomes five": (Net(lambda m, x: m.c(x) + m.p, c=conv(4, 1, 3), p=parameter(1, 5, 1, 1)), (X,)),
    "a convolution plus doubles": (
        Net(lambda m, x: m.c(x) + torch.linspace(0, 1, 32, dtype=torch.float64)[:, None, None], c=conv(4, 32, 3)),
        (X,),
    ),
    "layers of one input whose biases are inputs": (
        Net(
            lambda m, x, b: (F.conv2d(x, m.a.weight, b[0]), F.conv2d(x, m.b.weight, b[0])),
            a=conv(4, 6, 1),
            b=conv(4, 6, 1),
        ),
        (seeded(2, 4, 1, 1), seeded(1, 6)),
    ),
    "one weight with two strides": (
        Net(
            lambda m, x: (F.conv2d(x, m.w, padding=1), F.conv2d(x, m.w, padding=1, stride=2)), w=parameter(32, 4, 3, 3)
        ),
        (X,),
    ),
    "a product of doubles": (Net(lambda m, t: torch.sin(t.double() @ m.w.double()).float(), w=parameter(4, 8)), (T,)),
    "a convolution of doubles": (
        Net(lambda m, x: F.conv2d(x.double(), m.w.double()).float(), w=parameter(8, 4, 3, 3)),
        (X,),
    ),
    "a product of integers": (
        Net(lambda m, t: (t * 9).long() @ torch.arange(8).reshape(4, 2)),
        (T,),
    ),
    "attention of doubles": (
        Net(lambda m, q: F.scaled_dot_product_attention(*(q.double(),) * 3).float()),
        (seeded(2, 1, 6, 8),),
    ),
    "a norm of doubles": (Net(lambda m, x: F.group_norm(x.double(), 2).float()), (X,)),
    "a gate of integers": (
        Net(lambda m, t, k: m.l(k.sign().int() * F.gelu(t)), l=nn.Linear(4, 8)),
        (T, ROW),
    ),
    "SiLU of integers": (Net(lambda m, k: k.round().int() * torch.sigmoid(k.round().int())), (3 * T,)),
    "complex numbers": (
        Net(lambda m, t: m.l(torch.complex(t, t)).abs(), l=nn.Linear(4, 8, dtype=torch.complex64)),
        (T,),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_results_are_torchs(name):
    network, given = NETWORKS[name]
    expected = network.eval()(*given)
    fast = cmfast.accelerate(network)
    for _ in range(2):
        found = fast(*given)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert error(a, b.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_torchs_default_dtype_is_of_no_matter(dtype):
    torch.manual_seed(0)
    normed = nn.Sequential(conv(4, 32, 3), nn.GroupNorm(8, 32), nn.SiLU(), conv(32, 32, 3)).eval()
    unit = Net(lambda m, x: F.normalize(x, dim=1) * 3).eval()
    expected = normed(X), unit(X)
    try:
        torch.set_default_dtype(dtype)
        found = [cmfast.accelerate(network)(X) for network in (normed, unit)]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b.double()) < 1e-5


@torch.no_grad()
def test_autocast_changes_nothing_and_leaves_nothing_behind():
    network = Net(
        lambda m, x, t: (F.linear(t, m.w + m.b @ m.a), F.scaled_dot_product_attention(x, x, x, m.mask)),
        **{"w": parameter(8, 4), "a": parameter(2, 4), "b": parameter(8, 2), "mask": parameter(8, 8)},
    ).eval()
    expected = network(X, T)
    fast = cmfast.accelerate(network)
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found = fast(X, T)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            assert error(a, b.double()) < 1e-5


@torch.no_grad()
def test_no_thread_puts_another_into_training_mode():
    """Two calls at once of a network in training mode whose own forward runs: the second ends while the first runs."""
    inside, ended = threading.Event(), threading.Event()

    def forward(m, x, waits):
        y = m.c(x) + 0 * torch.rand(1)  # draws: so its own forward runs, and its parts are accelerated
        if waits and not torch.compiler.is_compiling() and type(y) is torch.Tensor and y.device.type == "cpu":
            inside.set()
            ended.wait(10)
        return m.drop(y)

    network = Net(forward, c=block(), drop=nn.Dropout(0.5))
    fast = cmfast.accelerate(network)
    expected = network.c(X)
    results = {}
    slow = threading.Thread(target=lambda: results.update(slow=fast(X, True)))
    assert error(fast(X, False), expected.double()) < 1e-5
    inside.clear()
    slow.start()
    assert inside.wait(30)
    assert error(fast(X, False), expected.double()) < 1e-5
    ended.set()
    slow.join()
    assert error(results["slow"], expected.double()) < 1e-5
    assert network.drop.training


def test_batches_of_nothing_leave_a_network_in_training_mode_as_it_was():
    network = nn.Sequential(conv(4, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        assert cmfast.accelerate(network)(torch.zeros(0, 4, 8, 8)).shape == (0, 8, 6, 6)
    assert int(network[1].num_batches_tracked) == 0
    assert network[1].training


@pytest.mark.parametrize(
    "draw",
    [lambda: random.random(), lambda: float(np.random.rand())],  # noqa: NPY002
    ids=["Python's", "numpy's"],
)
@torch.no_grad()
def test_random_numbers_are_drawn_at_each_call(draw):
    network = Net(lambda m, x: m.c(x) * draw(), c=block()).eval()
    fast = cmfast.accelerate(network)
    assert not torch.equal(fast(X), fast(X))
    random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = network(X)
    random.seed(3), np.random.seed(3)  # noqa: NPY002
    assert error(fast(X), expected.double()) < 1e-5


class Config:
    def __init__(self, **entries):
        self.__dict__.update(entries)


def test_what_a_network_is_told_by_is_watched():
    """A namespace, an entry with a module's attribute's name, and an object that is met far from the module first."""
    config = Config(opts={"s": 2.0})
    network = Net(
        lambda m, x: m.c(x) * m.args.scale * (3.0 if m.cfg["training"] else 1.0) * m.near.opts["s"],
        c=conv(4, 32, 3),
        args=argparse.Namespace(scale=2.0),
        cfg={"training": False},
    ).eval()
    network.deep = {"x": {"y": {"z": config}}}
    network.near = config
    fast = cmfast.accelerate(network)

    def change(of, name, value):
        of.__setitem__(name, value) if isinstance(of, dict) else setattr(of, name, value)

    with torch.no_grad():
        assert error(fast(X), network(X).double()) < 1e-5
        for of, name, value in ((network.args, "scale", 5.0), (network.cfg, "training", True), (config.opts, "s", 7.0)):
            before = network(X)
            change(of, name, value)
            assert error(network(X), before.double()) > 0.1
            assert error(fast(X), network(X).double()) < 1e-5


@pytest.mark.parametrize(
    "function",
    [lambda m, i: F.linear(F.silu(m.l(m.e(i))), m.e.weight), lambda m, i: (m.l(m.e(i)), m.l.weight.sum())],
    ids=["tied", "read"],
)
def test_weights_that_torch_reads_too_are_not_given_up(function):
    network = Net(function, e=nn.Embedding(10, 8), l=nn.Linear(8, 8)).eval()
    i = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = network(i)
        fast = cmfast.accelerate(network, keep_weights=False)
        for _ in range(2):
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (fast(i), expected)), strict=True):
                assert error(a, b.double()) < 1e-5


def test_a_consistency_model_of_a_network_that_draws_is_accelerated_in_parts():
    network = Net(lambda m, x, t, labels: m.c(x) + 0 * torch.rand(1), c=block()).eval()
    model = ConsistencyModel(network, EDM(), sample_shape=(4, 8, 8))
    assert cmfast.accelerate(model).sample(2, sampler="euler", steps=2).shape == (2, 4, 8, 8)


def test_an_unconditional_model_is_made_ready_for_its_own_call():
    network = Net(lambda m, x, t, labels: m.c(x), c=conv(4, 4, 3, padding=1)).eval()
    fast = cmfast.accelerate(ConsistencyModel(network, EDM(), sample_shape=(4, 8, 8)))
    programs = fast.unet._compiled_call_impl.accelerator._made.programs
    assert len(programs) == 1
    fast.sample(1, sampler="euler", steps=2)
    assert len(programs) == 1


def test_a_refusal_ends_with_its_reason():
    """A forward that raises until something is set is tried again: and then captured as a whole."""

    def forward(m, x):
        if m.cond is None:
            raise ValueError("no condition")
        return m.c(x) * m.cond

    network = Net(forward, c=conv(4, 32, 3), cond=None).eval()
    fast = cmfast.accelerate(network)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match="no condition"):
                fast(X)
        fast.cond = 2.0
        expected = 2.0 * network.c(X)
        assert error(fast(X), expected.double()) < 1e-5
        assert not cmfast.explain(fast, X).left


def test_an_interrupt_while_waiting_to_be_alone_leaves_the_turns_as_they_were(monkeypatch):
    turns = Turns()

    def interrupted(*_):
        raise KeyboardInterrupt

    with turns.beside():
        monkeypatch.setattr(turns._condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.alone():
            pass
        monkeypatch.undo()
    with turns.alone():
        pass
    assert turns._beside == 0

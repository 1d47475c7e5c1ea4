"""Calls on a GPU that are made again by their launches: the same launches, and the same results to the bit."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cmfast.kernels import (
    BackendError,
    attention,
    backends,
    consistency_step,
    conv2d,
    group_norm,
    prepare_conv,
    recorder,
    remembered,
    use_backend,
)
from cmfast.kernels.conv_weights import pack
from cmfast.kernels.recorder import Recorder, derived, live, plain
from cmfast.kernels.relaunch import relaunch
from torch._subclasses import FakeTensorMode
from torch.utils import _python_dispatch

from . import emulation
from .backends import ON_GPU, served
from .test_direct import normal

#: The backends that these tests can run: without a GPU the emulation takes tensors of the processor.
BACKENDS = [b.values[0] for b in served("group_norm") if b.values[0] in (("cuda", "triton") if ON_GPU else ("cuda",))]
BACKENDS = [*dict.fromkeys(BACKENDS)] if ON_GPU or not emulation.missing() else []
DEVICE = "cuda" if ON_GPU else "cpu"
ROOT = Path(__file__).parents[2]
on_the_processor = pytest.mark.skipif(ON_GPU or not BACKENDS, reason="of tensors that the emulation takes")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _remembers(monkeypatch):
    """Without a GPU, calls of CPU tensors are remembered; none is before the test."""
    if ON_GPU:  # conftest.py moves tensors to the GPU, where these are
        for name in ("group_norm", "attention", "consistency", "conv"):
            monkeypatch.setattr(sys.modules[f"cmfast.kernels.{name}"], "resolve", backends.resolve)
    else:
        monkeypatch.setattr(remembered, "DEVICES", {1})
    remembered.forget()
    yield
    remembered.forget()


@pytest.fixture
def recalled(monkeypatch):
    """Whether each call was made again."""
    found, recall = [], remembered.recall

    def noting(*arguments):
        results = recall(*arguments)
        found.append(results is not None)
        return results

    monkeypatch.setattr(remembered, "recall", noting)
    return found


def draw(seed, *shape, dtype=torch.float32, layout=torch.contiguous_format):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return t.to(DEVICE, dtype, memory_format=layout)


def norm_of(shape, dtype, layout, *, pair=False, film=False):
    def call(seed, backend):
        n, c, *positions = shape
        x = draw(seed, *shape, dtype=dtype, layout=layout)
        other = draw(seed + 100, n, 32, *positions, dtype=dtype, layout=layout)
        c += 32 * pair
        rows = {"scale": draw(seed + 1, n, c), "shift": draw(seed + 2, n, c), "add": draw(seed + 3, n, c)}
        extra = rows | {"activation": "silu"} if film else {}
        weight, bias = draw(seed + 4, c), draw(seed + 5, c)
        return group_norm((x, other) if pair else x, 32, weight, bias, backend=backend, **extra)

    return call


def attention_of(*shape, packed=False):
    def call(seed, backend):
        if packed:
            q, k, v = draw(seed, 3, *shape, dtype=torch.bfloat16).unbind()
        else:
            q, k, v = (draw(seed + i, *shape, dtype=torch.bfloat16) for i in range(3))
        return attention(q, k, v, backend=backend)

    return call


def conv_of(**options):
    weight, bias = draw(1, 64, 32, 3, 3) / 17, draw(2, 64)
    prepared = prepare_conv(weight, bias, padding=1, dtype=torch.bfloat16, height=32, width=16, tile=1)
    prepared = prepared._replace(packed=pack(weight, torch.bfloat16))

    def call(seed, backend):
        x = draw(seed, 2, 32, 32, 16, dtype=torch.bfloat16, layout=LAST)
        given = dict(options)
        if given.pop("fused", False):
            given |= {"gain": draw(seed + 1, 2, 32), "offset": draw(seed + 2, 2, 32), "silu": True, "moments": True}
            given |= {"residual": draw(seed + 3, 2, 64, 32, 16, dtype=torch.bfloat16, layout=LAST)}
        return conv2d(x, prepared, backend=backend, **given)

    return call


def step_of(**options):
    """Of numbers that are others in each call."""

    def call(seed, backend):
        x = draw(seed, 2, 4, 8, 8)
        output = draw(seed + 1, 2, 4, 8, 8, dtype=torch.bfloat16)
        given, numbers = {"clip": (-0.5 - seed, 1.0)}, [0.5 + seed, 1.0 / (1 + seed)]
        if options.get("vectors"):
            numbers = [draw(seed + 2, 2), 0.25 * seed]
            given["clip"] = None
        if options.get("noise"):
            given |= {"beta": 0.1 * seed, "noise": draw(seed + 3, 2, 4, 8, 8)}
        if options.get("seed"):  # as large as may be
            given |= {"alpha": 1 + seed, "beta": draw(seed + 3, 2), "seed": (1 << 64) - 1 - seed, "draw": seed}
            given |= {"first_sample": 10 * seed, "input_scale": 2.0 - seed}
        if options.get("seed") == "in a tensor":
            given |= {name: torch.tensor(seed - 2, device=DEVICE) for name in ("seed", "first_sample")}
        return tuple(consistency_step(x, output, *numbers, **given, backend=backend))

    return call


CALLS = {
    "consistency step": step_of(),
    "consistency step of vectors": step_of(vectors=True),
    "consistency step with noise": step_of(noise=True),
    "consistency step with all it can": step_of(seed="a number"),
    "consistency step of a seed in a tensor": step_of(seed="in a tensor", vectors=True),
    "group norm": norm_of((2, 64, 5, 7), torch.float32, torch.contiguous_format),
    "group norm of many positions": norm_of((1, 64, 24, 24), torch.float32, LAST),
    "group norm with all it can, bfloat16": norm_of((2, 64, 8, 8), torch.bfloat16, LAST, film=True),
    "group norm of a pair": norm_of((2, 64, 8, 8), torch.float16, LAST, pair=True, film=True),
    "attention": attention_of(1, 2, 33, 32),
    "attention of views": attention_of(2, 2, 16, 64, packed=True),
    "conv2d": conv_of(),
    "conv2d with all it can": conv_of(fused=True),
}


def leaves(results):
    return [t for t in (results if isinstance(results, tuple) else [results]) if t is not None]


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_made_again_give_the_same(monkeypatch, recalled, backend, call):
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "recall", lambda *_: None)
        wanted = [leaves(call(seed, backend)) for seed in range(4)]
    remembered.forget()
    found = [leaves(call(seed, backend)) for seed in range(4)]
    assert recalled == [False, False, True, True]
    for results, others in zip(found, wanted, strict=True):
        for t, other in zip(results, others, strict=True):
            assert torch.equal(t, other)
            assert (t.stride(), t.dtype) == (other.stride(), other.dtype)


OTHERS = {
    "another shape": lambda: {"x": normal(2, 64, 4, 3)},
    "another dtype": lambda: {"x": normal(2, 64, 4, 4).bfloat16()},
    "another layout": lambda: {"x": normal(2, 64, 4, 4, layout=LAST)},
    "other strides": lambda: {"x": normal(2, 64, 4, 8)[..., ::2]},
    "another alignment": lambda: {"x": normal(2 * 64 * 16 + 1)[1:].view(2, 64, 4, 4)},
    "another number": lambda: {"eps": 1e-3},
    "other groups": lambda: {"num_groups": 16},
    "an activation": lambda: {"activation": "silu"},
    "another tensor": lambda: {"bias": normal(64)},
    "a tensor in two places": lambda: {"bias": None, "scale": (s := normal(2, 64)), "shift": s},
    "float64": lambda: {"x": normal(2, 64, 4, 4).double(), "backend": "reference"},
    "a subclass": lambda: {"weight": normal(64).as_subclass(Subclass)},
    "a gradient": lambda: {"weight": normal(64).requires_grad_()},
}


class Subclass(torch.Tensor):
    """Another type of tensor."""


def of_one_kind(**changes):
    given = {"x": normal(2, 64, 4, 4), "num_groups": 32, "weight": normal(64), "backend": "cuda"} | changes
    return group_norm(given.pop("x"), given.pop("num_groups"), **given)


@on_the_processor
class TestOfOneKind:
    """What is remembered serves calls of one key, and nothing else."""

    @pytest.fixture(autouse=True)
    def _seen(self, _remembers, recalled):
        for _ in range(3):
            of_one_kind()
        assert recalled[-1]
        recalled.clear()

    @pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
    def test_other_calls_take_the_long_way(self, recalled, changes):
        of_one_kind(**changes())
        assert not any(recalled)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_groups": 5},
            {"activation": "gelu"},
            {"weight": normal(63)},
            {"x": normal(64)},
            {"eps": [1]},
            {"eps": {}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_does_not_fit_is_refused_each_time(self, changes):
        for _ in range(4):
            with pytest.raises((ValueError, TypeError)):
                of_one_kind(**changes)

    def test_a_backend_that_is_chosen_serves(self, monkeypatch):
        before = set(remembered._calls)
        for _ in range(2):  # the environment's is a part of the key
            for name in ("reference", "cuda"):
                monkeypatch.setenv("CMFAST_BACKEND", name)
                of_one_kind(backend=None)
        new = set(remembered._calls) - before
        assert sorted(remembered._calls[key] is False for key in new) == [False, True]

    def test_use_backend_is_as_good_as_its_name(self, recalled):
        with use_backend("cuda"):
            of_one_kind(backend=None)
        with use_backend("reference"):
            for _ in range(3):
                of_one_kind(backend=None)
        assert recalled == [True, False, False, False]

    @pytest.mark.parametrize("name", ["CMFAST_AUTOTUNE", "CMFAST_CACHE"])
    def test_what_chooses_tiles_is_a_part_of_the_key(self, recalled, monkeypatch, name):
        monkeypatch.setenv(name, "1")
        of_one_kind()
        assert recalled == [False]

    def test_tensors_of_another_device_are_not_recalled(self, recalled, monkeypatch):
        monkeypatch.setattr(remembered, "DEVICES", {2, 10})
        monkeypatch.delenv("CMFAST_GPU_ON_CPU")
        with pytest.raises(BackendError, match="the CUDA kernels run on an NVIDIA GPU"):
            of_one_kind()
        assert recalled == [False]

    def test_the_device_is_a_part_of_the_key(self, recalled, monkeypatch):
        described = remembered._described
        monkeypatch.setattr(remembered, "_described", lambda given: (*described(given)[:4], 1))
        of_one_kind()
        assert recalled == [False]

    def test_one_tensor_in_two_places_is_not_two_tensors(self, recalled):
        same, other = normal(2, 64), normal(2, 64) + 1
        for _ in range(3):
            of_one_kind(scale=same, shift=same)
        assert recalled == [False, False, True]
        found = of_one_kind(scale=same, shift=other)
        assert torch.equal(found, group_norm(normal(2, 64, 4, 4), 32, normal(64), scale=same, shift=other))
        assert not recalled[-1]

    def test_modes_see_every_call(self, recalled):
        with torch.profiler.profile() as profile:
            of_one_kind()
        assert "cmfast::group_norm" in {event.name for event in profile.events()}
        assert not any(recalled)

    def test_results_are_new_each_time(self):
        first, second = of_one_kind(), of_one_kind()
        assert first.data_ptr() != second.data_ptr()

    def test_results_of_inference_mode_are_of_it(self, recalled):
        with torch.inference_mode():
            assert of_one_kind().is_inference()
        assert recalled == [True]
        assert not of_one_kind().is_inference()


@on_the_processor
@pytest.mark.parametrize("why", ["a copy", "an error"])
def test_what_launches_alone_do_not_do_is_not_remembered(monkeypatch, recalled, why):
    scale = normal(64, 2).T if why == "a copy" else None  # its channels are not adjacent
    if why == "an error":
        monkeypatch.setattr("cmfast.kernels.native.launch", fail)
    for _ in range(4):
        try:
            of_one_kind(scale=scale)
        except RuntimeError:
            assert why == "an error"
    assert recalled == [False] * 4
    assert recorder.current() is None


@on_the_processor
def test_threads_that_record_at_once_leave_no_mode_behind():
    first_began, second_began, first_ended = threading.Event(), threading.Event(), threading.Event()

    def first():
        first_began.set()
        assert second_began.wait(10)
        return torch.empty(1)

    def second():
        second_began.set()
        assert first_ended.wait(10)
        return torch.empty(1)

    def calls(function, size):
        for serve in (lambda: None, function):  # the second call is recorded
            remembered.serve("an operator", None, (normal(size),), serve)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(calls, first, 3)
        assert first_began.wait(10)
        other = pool.submit(calls, second, 4)
        one.result()
        first_ended.set()
        other.result()
    assert not _python_dispatch._is_in_torch_dispatch_mode


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x: x.permute(1, 0).select(0, 1), ""),
        (lambda x: torch.empty_like(x), ""),
        (lambda x: x + 1, "aten.add.Tensor was run"),
        (lambda x: x.zero_(), "aten.zero_.default was run"),
        (lambda x: x.sum().item(), "aten.sum.default was run"),
        (lambda x: x[0, 0].item(), "aten."),
        (lambda x: torch.equal(x, x), "aten.equal.default was run"),
        (lambda x: x.contiguous(memory_format=torch.contiguous_format), ""),
        (lambda x: x.t().contiguous(), "aten."),
    ],
    ids=["views", "memory", "a sum", "in place", "a number", "an element", "a comparison", "as it is", "a copy"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_more_than_memory_and_views_fails_to_be_recorded(mode, run, why):
    x = normal(3, 4)
    with mode(), Recorder([x.data_ptr()]) as record:
        run(x)
    assert record.failure.startswith(why) if why else not record.failure


def test_a_result_that_is_a_part_of_memory_is_not_made_again():
    with Recorder([]) as record:
        memory = torch.empty(10)
    record.launched(print, (record.address(memory),))
    with pytest.raises(ValueError, match="a result is not an allocation of its own"):
        relaunch(record, memory[:4])
    assert relaunch(record, memory)((), (), 0, 0).shape == (10,)


def test_a_launch_gets_the_numbers_of_its_own_call():
    given = []
    with Recorder([]) as record:
        memory = torch.empty(3)
    seed, scale = live(7, 0), live(0.5, 1)
    half = derived(lambda x: x >> 1, seed)
    arguments = (seed, half, derived(lambda x: 10 * x, half), [scale, 2.0], derived(abs, -3), record.address(memory))
    record.launched(lambda *values: given.append(values), arguments)
    results = [relaunch(record, memory)((), numbers, 0, 0) for numbers in ((8, 1.5), (30, 2.5))]
    assert given == [
        (8, 4, 40, (1.5, 2.0), 3, results[0].data_ptr()),
        (30, 15, 150, (2.5, 2.0), 3, results[1].data_ptr()),
    ]
    assert [type(plain(x)) for x in (seed, scale, "text")] == [int, float, str]


def fail(*_):
    raise RuntimeError("seeded")


@on_the_processor
def test_memory_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    for size in range(1, 9):
        group_norm(normal(1, 32, size), 32, backend="reference")
    assert 0 < len(remembered._calls) <= 3


def test_a_launch_of_triton_is_made_on_the_device_of_its_tensors(monkeypatch):
    pytest.importorskip("triton")
    from cmfast.kernels.triton.launch import Launch

    made = []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: made.append(index) or contextlib.nullcontext())
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:0")
    kernel = {(1,): lambda *arguments, **options: made.append("launched")}
    Launch(kernel, (1,), (None, x), {}).run()
    Launch(kernel, (1,), (torch.empty(3),), {}).run()
    assert made == [0, "launched", "launched"]


@pytest.mark.skipif(ON_GPU, reason="a driver that launches nothing stands for the GPU's")
def test_launches_of_triton_are_the_same():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CMFAST_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.launches_made_again"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 17


@on_the_processor
@pytest.mark.usefixtures("_remembers")
def test_a_step_that_has_to_be_refused_is_refused_each_time():
    x, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4)
    for _ in range(3):
        consistency_step(x, output, 0.4, 0.7, alpha=1.0, backend="cuda")
        consistency_step(x, output, 0.4, 0.7, alpha=1.0, beta=0.3, seed=1, backend="cuda")
    for given in ({"beta": 0.5}, {"seed": 2}, {"noise": normal(2, 3, 4, 4)}):
        with pytest.raises(ValueError, match="beta"):
            consistency_step(x, output, 0.4, 0.7, alpha=1.0, **given, backend="cuda")

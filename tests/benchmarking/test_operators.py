"""What `cmfast bench operators` measures: that results are judged, and that rows are what they say."""

import functools
import itertools
import types

import pytest
import torch
from cmfast.kernels import backends, cpu, direct, native, reference

from cmfast.benchmarking import accuracy, calls, ceilings, devices
from cmfast.benchmarking.accuracy import WrongResultError, check_alike, judge
from cmfast.benchmarking.operators import TORCH, Operators
from cmfast.benchmarking.rounds import Candidate, Row, take_turns
from cmfast.benchmarking.serving import VoidError, launched, prepared, run_watched, served

from . import tiny


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 16)


class Still:
    """A device on which every call takes a second."""

    name, cache_bytes = "cpu", 1 << 20

    def timer(self, runs, position):
        runs[-1]()
        return self

    def turn(self):
        return 1.0

    def free(self):
        pass


def measured(ops=None, dtype=torch.float32, passes=1, **options):
    bench = Operators(tiny.calls(ops, dtype), Still(), **options)
    for _ in range(passes):
        list(bench.measure())
    return bench


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_operator_is_judged_and_measured(dtype):
    bench = measured(dtype=dtype)
    rows = bench.rows
    assert [row.problem for row in rows] == [""] * len(rows)
    assert {row.key["op"] for row in rows} == set(backends.OPERATORS)
    by_call = {}
    for row in rows:
        by_call.setdefault((row.key["op"], row.key["shape"]), []).append(row.key["backend"])
    own = set(cpu._OPERATORS)
    assert all(names == ["cpu" if op in own else "reference", TORCH] for (op, _), names in by_call.items())
    assert all(row.samples["cold"] == row.samples["warm"] == [1.0] * 3 for row in rows)
    assert all(0 <= row.facts["error"] < 2e-2 and row.facts["buffers"] > 1 for row in rows)
    assert {row.key["shape"] for row in bench.ceilings.values()} == {
        *("copy", "read", "cached copy", "launch", "product")
    }
    attention = next(row for row in rows if row.key["op"] == "attention")
    ceiling = bench.ceilings[f"product {attention.key['dtype']}"]
    assert attention.facts["share"] == pytest.approx(
        max(
            attention.facts["flops"] / ceiling.facts["flops"],
            attention.facts["bytes"] / bench.ceilings["copy"].facts["bytes"],
        )
    )


def test_chosen_backends_and_more_passes():
    rows = measured(["attention"], passes=2, backends=["reference"], rounds=2).rows
    assert [row.key["backend"] for row in rows] == ["reference", TORCH]
    assert all(len(row.samples["cold"]) == 4 for row in rows)


def test_a_wrong_result_has_no_time(monkeypatch):
    right = cpu.group_norm

    @functools.wraps(right)
    def wrong(*arguments):
        y, *rest = right(*arguments)
        return 1.001 * y, *rest

    monkeypatch.setattr(cpu, "group_norm", wrong)
    first, second = measured(["group_norm"], passes=2).rows
    assert first.problem.startswith("wrong: output 0: off by ")
    assert not first.samples
    assert first.flat()["problem"] == first.problem
    assert second.samples["cold"]


def test_a_row_that_another_backend_serves_is_void(monkeypatch):
    choose = backends.function
    monkeypatch.setattr(
        backends, "function", lambda name, op: reference.attention if op == "attention" else choose(name, op)
    )
    row = next(row for row in measured(["attention"]).rows if row.key["backend"] == "cpu")
    assert row.problem == "void: asked for cpu, and cmfast.kernels.reference.attention serves attention"
    assert not row.samples


def test_a_backend_that_calls_another_inside_is_void(monkeypatch):
    first, _ = measured(["attention"]).rows

    @functools.wraps(cpu.attention)
    def elsewhere(*arguments):
        return reference.attention(*arguments)

    monkeypatch.setattr(cpu, "attention", elsewhere)
    row = next(row for row in measured(["attention"]).rows if row.key["backend"] == "cpu")
    assert row.problem == "void: asked for cpu, and reference served it"
    assert not first.problem


def test_a_backend_forced_away_between_two_passes_is_void(monkeypatch):
    bench = measured(["channel_moments"])
    assert bench.rows[0].samples
    monkeypatch.setattr(cpu, "channel_moments", functools.wraps(cpu.channel_moments)(reference.channel_moments))
    list(bench.measure())
    assert bench.rows[0].problem.startswith("void: ")
    assert not bench.rows[0].samples


def test_what_is_watched():
    (call,) = tiny.calls(["fold_group_norm"])
    given = calls.values(call, "cpu")
    assert run_watched("cpu", served(call, "cpu", given)) is not None
    with pytest.raises(VoidError, match="asked for reference, and cpu served it"):
        run_watched("reference", served(call, "cpu", given))
    with pytest.raises(backends.BackendError, match="backend 'cuda' cannot serve"):
        served(call, "cuda", given)


@pytest.mark.parametrize("size", [8, 3])
def test_winograd_is_judged_by_its_own_error(size):
    from cmfast.kernels import shapes

    call = shapes.conv_call(1, 64, 0, 48, size, 3, torch.float32, "residual moments")
    given = prepared(call, calls.values(call, "cpu"), "cpu")
    assert given[0].tile > 1
    out, moments = served(call, "cpu", given)()
    assert 0 < judge(call, given, (out, moments)) < 2e-5
    for wrong in ((out * 1.0001, moments), (out, moments * 1.0001), (out, moments + torch.tensor([[[1.0], [0.0]]]))):
        with pytest.raises(WrongResultError, match="of the norm"):
            judge(call, given, wrong)


def test_copies_are_alike_and_apart():
    for call in tiny.calls():
        given = calls.values(call, "cpu")
        copied = calls.copied(given)
        for a, b in zip(calls.tensors(given), calls.tensors(copied), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert a.data_ptr() != b.data_ptr() or not a.numel()


def test_turns_rotate():
    order = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def turn(self):
            order.append(self.name)
            return 1.0

    candidates = [Candidate(Row({"name": n}), {"cold": Noted(n)}) for n in "abc"]
    take_turns(candidates, 2)
    take_turns(candidates, 1, first=2)
    assert "".join(order) == "abcbcacab"


def test_a_turn_that_is_interrupted_leaves_a_whole_row():
    class Interrupted:
        def turn(self):
            raise KeyboardInterrupt

    row = Row({"name": "a"})
    with pytest.raises(KeyboardInterrupt):
        take_turns([Candidate(row, {"cold": Still(), "warm": Interrupted()})], 2)
    assert row.samples == {"cold": [1.0]}
    assert row.flat() == {
        **{"name": "a", "cold_s": 1.0, "cold_low_s": 1.0, "cold_high_s": 1.0, "rounds": 1, "problem": ""}
    }


def test_cold_buffers_are_not_touched_twice_in_a_row(monkeypatch):
    """The next candidate goes on where the last one stopped: what one has just read is not the other's."""
    touched, position = [], devices.Position()
    monkeypatch.setattr(devices, "TURN", 0)
    runs = [[lambda who=who, i=i: touched.append((who, i)) for i in range(5)] for who in "ab"]
    timers = [devices.Cpu().timer(each, position) for each in runs]
    touched.clear()
    for _ in range(5):
        for timer in timers:
            timer.turn()
    buffers = [i for _, i in touched]
    assert all((b - a) % 5 == 1 for a, b in itertools.pairwise(buffers))
    assert {i for who, i in touched if who == "a"} == set(range(5))


@pytest.mark.parametrize(("seconds", "untimed"), [(1e-4, 1), (2e-2, 1), (0.2, 0)])
def test_a_turn_is_long_enough_to_be_timed(monkeypatch, seconds, untimed):
    """Its first call is not timed where it is short: what ran before has taken the caches."""
    now = [0.0]
    monkeypatch.setattr(devices, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    calls_made = []

    def run():
        calls_made.append(None)
        now[0] += seconds * (1 if calls_made[1:] else 3)

    timer = devices.Cpu().timer([run], devices.Position())
    calls_made.clear()
    assert timer.turn() == pytest.approx(seconds if untimed else 3 * seconds)
    assert len(calls_made) == untimed + max(1, round(devices.TURN / seconds))


def test_the_cache_is_the_largest():
    assert devices.Cpu().cache_bytes >= 1 << 18


def test_large_group_norms_are_judged_by_their_first_groups(monkeypatch):
    """With FiLM and an addition as well; what is wrong in them is seen."""
    monkeypatch.setattr(accuracy, "LARGE", 1)
    for call in tiny.calls(["group_norm"]):
        given = calls.values(call, "cpu")
        y, mean, rstd = cpu.group_norm(*given)
        assert accuracy.judge(call, given, (y, mean, rstd)) < 1e-5
        y[:, 0] += 0.1
        with pytest.raises(accuracy.WrongResultError):
            accuracy.judge(call, given, (y, mean, rstd))


@torch.no_grad()
def test_the_processors_calls_are_timed_by_their_short_way(monkeypatch):
    long_ways = []
    real = native.run
    monkeypatch.setattr(native, "run", lambda *given: long_ways.append(given[0]) or real(*given))
    for call in tiny.calls():
        if call.op.endswith("_backward") or "average" in call.form:  # which have none
            continue
        given = prepared(call, calls.values(call, "cpu"), "cpu")
        run = launched(call, "cpu", given)
        long_ways.clear()
        short = run()
        assert not long_ways, call.op
        check_alike(short, served(call, "cpu", given)())
        assert long_ways, call.op


def test_a_short_way_that_gives_other_values_is_wrong(monkeypatch):
    real = direct.plain.ran

    def ran(name, y, *others):
        done = real(name, y, *others)
        y += 1
        return done

    monkeypatch.setattr(direct.plain, "ran", ran)
    row = next(row for row in measured(["channel_norm"]).rows if row.key["backend"] == "cpu")
    assert row.problem == "wrong: output 0: the short way gives other values than the long one"
    assert not row.samples

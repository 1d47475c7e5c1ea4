"""`cmfast bench`: files, verdicts, Ctrl-C and exit statuses; what is measured is in tests/benchmarking."""

import csv
import functools
import importlib
import json

import pytest
import torch
from cmfast.kernels import cpu
from PIL import Image

from cmfast.benchmarking import calls, ceilings
from cmfast.benchmarking.operators import Operators

from .benchmarking import tiny


def module(name):
    """A command's module: the package has functions of the same names."""
    return importlib.import_module(f"cmfast.cli.bench.{name}")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(module("operators"), "calls", tiny.calls)
    monkeypatch.setitem(ceilings.BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 16)
    monkeypatch.setattr("cmfast.benchmarking.devices.Cpu.cache_bytes", 1 << 16)


def test_operators_and_their_files(cmfast, tmp_path, monkeypatch):
    tiny.Clock(monkeypatch, seed=0)
    files = {kind: tmp_path / "new" / f"rows.{kind}" for kind in ("csv", "json", "png")}
    options = ("--ops", "group_norm,timestep_embedding", "--passes", 2, "--batch-sizes", "1,2")
    status, out, err = cmfast(
        *("bench", "operators", *options, "--csv", files["csv"], "--json", files["json"], "--plot", files["png"])
    )
    assert status == 0, err
    assert "18/18" not in err
    assert "10/10" in err
    assert "ceiling: copy" in out
    document = json.loads(files["json"].read_text())
    settings = {"command": "operators", "dtype": "float32", "batch_sizes": "1,2", "passes": 2, "rounds": 3}
    assert settings.items() <= document["settings"].items()
    assert document["environment"]["extensions"]["cpu"]["isa"]
    assert "clocks" in document["environment"]
    rows = [row for row in document["rows"] if row["op"] != "ceiling"]
    assert [(row["shape"], row["backend"]) for row in rows] == [
        (shape, backend)
        for op in (("1x32x4x4", "cpu"), ("1 8", "reference"), ("2x32x4x4", "cpu"), ("2 8", "reference"))
        for shape, backend in ((op[0], op[1]), (op[0], "torch"))
    ]
    assert all(len(row["samples"]["cold"]) == row["rounds"] == 6 for row in rows)
    norm, plain = rows[:2]
    assert norm["cold_s"] == pytest.approx(1e-3, rel=0.1)
    assert plain["cold_s"] == pytest.approx(1.5e-3, rel=0.1)
    assert norm["gb_per_s"] == pytest.approx(norm["bytes"] / norm["cold_s"] / 1e9)
    assert 0 < norm["error"] < 1e-6
    with files["csv"].open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["backend"] for row in table] == [row["backend"] for row in document["rows"]]
    assert json.loads(table[0]["settings"]) == document["settings"]
    assert table[0]["isa"] == document["environment"]["extensions"]["cpu"]["isa"]
    picture = Image.open(files["png"])
    assert picture.width == 1170
    assert "torch 2" in picture.text["Description"]
    assert "dtype float32" in picture.text["Description"]


def compared(cmfast, monkeypatch, tmp_path, seed, slow=()):
    """(status, output, errors) of a run beside tmp_path/old.json."""
    with monkeypatch.context() as patch:
        tiny.Clock(patch, seed, slow)
        return cmfast("bench", "operators", "--compare", tmp_path / "old.json")


def test_a_fifth_more_of_one_operator_is_found_and_of_two_runs_alike_nothing(cmfast, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        tiny.Clock(patch, seed=0)
        assert cmfast("bench", "operators", "--json", tmp_path / "old.json")[0] == 0
    for seed in (1, 2):
        status, out, err = compared(cmfast, monkeypatch, tmp_path, seed)
        assert status == 0, out + err
        assert "slower" not in out
        assert "the machine took" in out
    status, out, _ = compared(cmfast, monkeypatch, tmp_path, 3, slow=("attention",))
    assert status == 1
    slower = [" ".join(line.split()) for line in out.splitlines() if line.rstrip().endswith("slower")]
    assert {line.split()[0] for line in slower} == {"attention"}
    assert {line.split()[-4] for line in slower} == {"cold", "warm"}
    assert all(float(line.split()[-3]) == pytest.approx(1.2, abs=0.05) for line in slower)
    assert "2 slower" in out


def test_a_wrong_result_ends_with_1_and_has_no_time(cmfast, monkeypatch, tmp_path):
    right = cpu.attention

    @functools.wraps(right)
    def wrong(*arguments):
        out, lse = right(*arguments)
        return 1.01 * out, lse

    monkeypatch.setattr(cpu, "attention", wrong)
    path = tmp_path / "a.json"
    status, out, _ = cmfast("bench", "operators", "--ops", "attention", "--passes", 1, "--rounds", 1, "--json", path)
    assert status == 1
    assert "cpu: wrong: output 0: off by" in " ".join(out.split())
    row = next(row for row in json.loads(path.read_text())["rows"] if row["backend"] == "cpu")
    assert "cold_s" not in row
    assert not row["samples"]
    assert row["problem"].startswith("wrong: ")


def test_a_backend_forced_away_makes_its_row_void(cmfast, monkeypatch):
    from cmfast.kernels import backends, reference

    choose = backends._function
    monkeypatch.setattr(
        backends, "_function", lambda name, op: reference.group_norm if op == "group_norm" else choose(name, op)
    )
    status, out, _ = cmfast("bench", "operators", "--ops", "group_norm", "--passes", 1, "--rounds", 1)
    assert status == 1
    assert "cpu: void: asked for cpu, and cmfast.kernels.reference.group_norm serves" in " ".join(out.split())


def test_control_c_keeps_what_is_done(cmfast, monkeypatch, tmp_path):
    measure, passes = Operators._measure, []

    def interrupted(self, call):
        passes.append(call.op)
        if passes.count("attention") == 2:
            raise KeyboardInterrupt
        measure(self, call)

    monkeypatch.setattr(Operators, "_measure", interrupted)
    path = tmp_path / "a.json"
    options = ("--ops", "attention,channel_norm", "--rounds", 1, "--passes", 3)
    status, out, _ = cmfast("bench", "operators", *options, "--json", path)
    assert status == 130
    assert "interrupted: these rows are of the rounds that were done" in out
    rows = [row for row in json.loads(path.read_text())["rows"] if row["op"] != "ceiling"]
    assert [(row["op"], row["rounds"]) for row in rows] == [("channel_norm", 2)] * 2 + [("attention", 1)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ops", "convolution"), "--ops must be some of group_norm, "),
        (("--backends", "cuda,fast"), "--backends must be some of cuda, triton, cpu, reference, got fast"),
        (("--batch-sizes", "0"), "--batch-sizes must be positive, got 0"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "xpu"), "--device xpu cannot be used"),
        (("--json", "/proc/a.json"), "no folder in which a.json can be written"),
        (("--compare", "none.json"), "none.json: No such file"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_measured(cmfast, monkeypatch, arguments, message):
    monkeypatch.setattr(Operators, "measure", lambda self: pytest.fail("that was found out too late"))
    status, _, err = cmfast("bench", "operators", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_runs_of_other_settings_are_not_compared(cmfast, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    assert cmfast("bench", "operators", "--ops", "fold_group_norm", "--passes", 1, "--json", path)[0] == 0
    monkeypatch.setattr(Operators, "measure", lambda self: pytest.fail("that was found out too late"))
    status, _, err = cmfast("bench", "operators", "--dtype", "bfloat16", "--compare", path)
    assert status == 2
    assert "the runs differ in dtype float32 and bfloat16" in err


def test_large_calls_are_left_out_on_the_cpu_unless_asked_for(monkeypatch):
    from cmfast.kernels import shapes

    monkeypatch.setattr(module("operators"), "calls", shapes.calls)
    small, left_out = module("operators")._calls(None, "float32", [1], False)
    every, none = module("operators")._calls(None, "float32", [1], True)
    assert (left_out, none) == (3, 0)
    assert len(every) == len(small) + 3
    names = {calls.name(call) for call in every} - {calls.name(call) for call in small}
    assert {name.split()[1] for name in names} == {"1x256x256x256"}
    assert {call.dtype for call in every} == {"float32"}
    assert all(torch.float32 == call.arguments[0].dtype for call in every if call.op == "attention")

"""`cmfast bench`: files, verdicts, Ctrl-C and exit statuses; what is measured is in tests/benchmarking."""

import csv
import functools
import importlib
import json
import math

import pytest
import torch
import typer
from cmfast.kernels import cpu
from PIL import Image

from cmfast import load
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
        for op in (("1x32x4x4", "cpu"), ("1 8", "cpu"), ("2x32x4x4", "cpu"), ("2 8", "cpu"))
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
    assert_shown_again(cmfast, files, out.partition("ceiling: ")[0])
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
    status, out, err = compared(cmfast, monkeypatch, tmp_path, 1)
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

    choose = backends.function
    monkeypatch.setattr(
        backends, "function", lambda name, op: reference.group_norm if op == "group_norm" else choose(name, op)
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


def test_model_and_its_files(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("cmfast.benchmarking.devices.TURN", 1e-6)
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "json", "png")}
    options = ("--rounds", 2, "--batch-sizes", "1,2", "--threads", 1)
    written = ("--csv", files["csv"], "--json", files["json"], "--plot", files["png"])
    status, out, err = cmfast("bench", "model", *options, *written)
    assert status == 0, err
    assert "one evaluation of digits, float32" in out
    document = json.loads(files["json"].read_text())
    rows = [row for row in document["rows"] if "variant" in row]
    assert [(row["batch"], row["variant"]) for row in rows] == [
        (n, variant) for n in (1, 2) for variant in ("torch", "eager", "accelerated")
    ]
    assert all(row["evaluation_s"] > 0 and row["rounds"] == 2 for row in rows)
    assert document["settings"]["network"] == "digits"
    assert len(list(csv.DictReader(files["csv"].open()))) == len(document["rows"])
    assert Image.open(files["png"]).width == 1170
    assert_shown_again(cmfast, files, out)
    status, out, _ = cmfast("bench", "model", *options, "--compare", files["json"])
    assert status == 0
    assert "compared: 4 unclear" in out  # two rounds say nothing


def assert_shown_again(cmfast, files, said):
    """`bench show` says and draws of the JSON file what the run itself did."""
    again = files["png"].with_name("again.png")
    status, out, err = cmfast("bench", "show", files["json"], "--plot", again)
    assert status == 0, err
    shown = [line for line in said.splitlines() if not line.startswith(("wrote", "quality"))]
    assert len(shown) > 5
    assert out.splitlines()[: len(shown)] == shown
    first, second = Image.open(files["png"]), Image.open(again)
    assert second.size == first.size
    assert second.text["Description"].rpartition(";")[2] == first.text["Description"].rpartition(";")[2]
    status, out, _ = cmfast("bench", "show", files["json"], "--markdown")
    assert out.count("|---") >= 1
    assert "torch 2" in out


@pytest.mark.parametrize("turn", [1, 3])
def test_control_c_in_a_model(cmfast, monkeypatch, tmp_path, turn):
    """In its first round or a later one: some rows have more samples than others."""
    turns = []
    take = importlib.import_module("cmfast.benchmarking.model").take_turns

    def interrupted(candidates, *arguments, **options):
        turns.append(None)
        if len(turns) == turn:
            take(candidates[:1], *arguments, **options)
            raise KeyboardInterrupt
        take(candidates, *arguments, **options)

    monkeypatch.setattr("cmfast.benchmarking.model.take_turns", interrupted)
    monkeypatch.setattr("cmfast.benchmarking.devices.TURN", 1e-6)
    path = tmp_path / "rows.json"
    status, out, _ = cmfast("bench", "model", "--variants", "accelerated,eager", "--json", path)
    assert status == 130
    assert "accelerated" in out
    assert "interrupted" in out
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"] if "variant" in row["key"]}
    assert [len(row["samples"]["evaluation"]) for row in rows.values()] == ([1] if turn == 1 else [3, 2])
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(1 / row["evaluation_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "sd"), "--network must be one of imagenet64, lsun256, got sd"),
        (("--variants", "fast"), "--variants must be some of torch, eager, accelerated, got fast"),
        (("--batch-sizes", "0,1"), "--batch-sizes must be positive, got 0,1"),
        (("--peers", "tensorflow"), "--peers must be some of cmfast, "),
        (("--peers", "torch", "--network", "sd"), "--peers know the networks imagenet64, lsun256, digits, "),
        (("--peers", "torch", "--dtype", "float16"), "--peers are measured in float32 or bfloat16, got float16"),
    ],
)
def test_bad_arguments_of_model(cmfast, arguments, message):
    status, _, err = cmfast("bench", "model", *arguments)
    assert status == 2
    assert message in err


def test_peers_need_a_checkout(cmfast, monkeypatch, tmp_path):
    monkeypatch.setattr(module("model"), "_ROOT", tmp_path)
    status, _, err = cmfast("bench", "model", "--peers", "torch")
    assert status == 2
    assert "--peers needs a checkout of cmfast" in err


def test_peers_have_rows_beside_ours(cmfast, monkeypatch, tmp_path):
    """The workers are those of benchmarks/peers (tests/test_peers.py); here it is what becomes of their rows."""
    compare = module("model")._compare_module()
    base = {"version": "1", "conversion": 0.0, "start": 1.0, "memory": 0.1, "ratio": 1.0, "note": ""}
    found = [
        {**base, "peer": "cmfast", "error": 1e-6, "seconds": 0.5, "rounds": [0.5, 0.5]},
        {**base, "peer": "cmfast-eager", "error": 1e-6, "seconds": 1.0, "rounds": [1.0, 1.0]},
        {**base, "peer": "torch", "error": 0.5, "seconds": None, "rounds": [], "note": "its output is wrong"},
        {**base, "peer": "ncnn", "error": None, "seconds": None, "rounds": [], "note": "ncnn is not installed"},
    ]
    asked = []

    interrupted = []

    def measure(case, peers, rounds, say):
        asked.append((case.network, case.batch, case.dtype, peers, rounds))
        if case.batch in interrupted:
            raise compare.Interrupted(found) if case.batch == 2 else KeyboardInterrupt
        return found

    monkeypatch.setattr(compare, "measure", measure)
    path = tmp_path / "a.json"
    status, out, _ = cmfast(
        "bench",
        "model",
        "--peers",
        "torch,ncnn",
        "--rounds",
        2,
        "--batch-sizes",
        2,
        "--dtype",
        "bfloat16",
        "--json",
        path,
    )
    assert asked == [("digits", 2, "bf16", ["cmfast", "cmfast-eager", "torch", "ncnn"], 2)]
    assert status == 1  # of a wrong output
    assert "torch bfloat16" not in out
    assert "wrong: off by 0.5 of the norm" in out
    assert "ncnn, batch 2: ncnn is not installed" in out
    rows = [row for row in json.loads(path.read_text())["rows"] if "variant" in row["key"]]
    assert [(row["key"]["variant"], row["control"], row["samples"]) for row in rows] == [
        ("cmfast", False, {"evaluation": [0.5, 0.5]}),
        ("cmfast-eager", False, {"evaluation": [1.0, 1.0]}),
        ("torch", True, {}),
        ("ncnn", True, {}),
    ]
    del found[2:], found[0]["rounds"][1:]
    found[1] |= {"rounds": [], "seconds": None}
    path.unlink()
    interrupted.append(2)  # in its first round
    arguments = ("bench", "model", "--peers", "torch", "--rounds", 2, "--batch-sizes", "1,2,3", "--json", path)
    for batch, rows in ((2, 3), (1, 0)):
        interrupted[:] = [batch]  # 1: while the peers start
        asked.clear()
        status, out, _ = cmfast(*arguments)
        assert status == 130
        assert "interrupted" in out
        assert [batch for _, batch, *_ in asked] == list(range(1, batch + 1))
        if rows:
            written = [row for row in json.loads(path.read_text())["rows"] if "variant" in row["key"]]
            assert [(row["batch"], row["variant"]) for row in written if row["samples"]] == [
                *[(1, "cmfast")],
                *[(2, "cmfast")],
            ]


def test_latency_of_a_network_with_random_weights(cmfast, monkeypatch, tmp_path):
    """Seconds alone, at each batch size; the released networks are too large here."""
    config = load("digits").unet.config
    monkeypatch.setattr(module("latency"), "configuration", lambda name: config)
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "json", "png")}
    options = ("--network", "imagenet64", "--batch-sizes", "1,3", "--consistency-steps", 2, "--steps", 2, "--rounds", 4)
    written = ("--csv", files["csv"], "--json", files["json"], "--plot", files["png"])
    status, out, err = cmfast("bench", "latency", *options, "--accelerate", *written)
    assert status == 0, err
    assert "quality: not measured" in out
    document = json.loads(files["json"].read_text())
    rows = [row for row in document["rows"] if "sampler" in row["key"]]
    assert [(r["sampler"], r["steps"], r["batch_size"], r["evaluations"]) for r in rows] == [
        (*row, n, evaluations) for n in (1, 3) for *row, evaluations in (("multistep", 2, 2), ("heun", 2, 3))
    ]
    assert all("accuracy" not in r and len(r["samples"]["batch"]) == 4 and r["first"] > 0 for r in rows)
    assert document["settings"]["model"] == "imagenet64"
    assert document["settings"]["accelerate"] is True
    assert len([row for row in document["rows"] if row["control"]]) == 5
    assert Image.open(files["png"]).width == 1170
    assert_shown_again(cmfast, files, out)
    status, out, _ = cmfast("bench", "latency", *options, "--accelerate", "--compare", files["json"])
    assert "compared: " in out
    assert status in (0, 1)  # of four rounds on a busy machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "sd"), "--network must be one of imagenet64, lsun256, sd15, got sd"),
        (("--batch-sizes", "4,0"), "--batch-sizes must be positive, got 4,0"),
        (("--compare", "none.json"), "none.json: No such file"),
    ],
)
def test_bad_arguments_of_latency(cmfast, arguments, message):
    status, _, err = cmfast("bench", "latency", *arguments)
    assert status == 2
    assert message in err


def test_control_c_in_latency(cmfast, monkeypatch, tmp_path):
    latency = importlib.import_module("cmfast.evaluation.latency")
    timed, calls_made = latency._timed, []

    def interrupted(*arguments):
        calls_made.append(None)
        if len(calls_made) > 7:
            raise KeyboardInterrupt
        return timed(*arguments)

    monkeypatch.setattr(latency, "_timed", interrupted)
    monkeypatch.setattr(latency, "SHORT", 0.0)  # each batch is drawn once
    options = ("--consistency-steps", "1", "--samplers", "euler", "--steps", 1, "--batch-size", 2)
    status, out, _ = cmfast("bench", "latency", *options, "--json", tmp_path / "a.json")
    assert status == 130
    assert "interrupted" in out
    rows = [row for row in json.loads((tmp_path / "a.json").read_text())["rows"] if "sampler" in row["key"]]
    assert [row["rounds"] for row in rows] == [2, 1]


def test_all_of_them_in_a_folder(cmfast, monkeypatch, tmp_path):
    asked = []

    def command(name, status):
        def run(**options):
            asked.append((name, options["json"].name, options["plot"].name, options["compare"], options["threads"]))
            if status:
                raise typer.Exit(status)

        return run

    for operators, status in ((1, 1), (0, 0), (130, 130)):
        asked.clear()
        monkeypatch.setattr(module("operators"), "operators", command("operators", operators))
        monkeypatch.setattr(module("model"), "model", command("model", 0))
        monkeypatch.setattr(module("latency"), "latency", command("latency", 0))
        assert cmfast("bench", "all", "--out", tmp_path / "out", "--threads", 1)[0] == status
        names = ("operators",) if status == 130 else ("operators", "model", "latency")
        assert asked == [(name, f"{name}.json", f"{name}.png", None, 1) for name in names]
    status, _, err = cmfast("bench", "all", "--out", tmp_path / "out", "--compare", tmp_path / "none")
    assert status == 2
    assert "has no operators.json" in err
    for name in ("operators", "model", "latency"):
        (tmp_path / f"{name}.json").write_text("{}")
    asked.clear()
    cmfast("bench", "all", "--out", tmp_path / "out", "--compare", tmp_path)
    assert asked[0][3] == tmp_path / "operators.json"


def test_a_peer_that_died_is_not_wrong_and_cmfast_has_to_run():
    def row(peer, **facts):
        told = dict.fromkeys(("version", "memory", "start", "conversion", "seconds"))
        return module("model")._row_of(
            {**told, "peer": peer, "error": None, "rounds": [], "note": "", **facts}, {"batch": 1}, 1e-3
        )

    assert row("openvino", error=1e-6, note="ended by SIGSEGV in turn").problem == ""
    assert row("openvino", error=2e-3).problem == "wrong: off by 0.002 of the norm"
    assert row("ncnn", error=math.nan).problem.startswith("wrong")
    assert row("cmfast", note="ended by SIGSEGV in start").problem == "ended by SIGSEGV in start"
    assert row("cmfast-eager").problem == "no time was taken"
    assert row("cmfast", error=1e-6, rounds=[0.1], seconds=0.1).problem == ""


def test_variants_are_not_measured_beside_peers(cmfast):
    status, _, err = cmfast("bench", "model", "--model", "digits", "--variants", "torch", "--peers", "ncnn")
    assert status == 2
    assert "--variants are measured without --peers" in err

"""benchmarks/gpu_check.py without a GPU: its dry run, what it does about faults, and what is made of its results."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from cmfast.kernels import native
from PIL import Image

from cmfast.benchmarking import accuracy, serving
from cmfast.benchmarking.calls import tensors

from .kernels import emulation

ROOT = Path(__file__).parent.parent
CHECK = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--emulate"]

needs_emulation = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def seeded(folder, code):
    """An environment in which the processes of the stages begin with some code."""
    begin = f"""
import sys
stage = next((a.rpartition(".")[2] for a in sys.orig_argv if a.startswith("benchmarks.gpu.")), "")
if stage:
    sys.path.insert(0, {str(ROOT)!r})
    import os, signal, time
    import torch
    from benchmarks.gpu import calls, device
    calls.DTYPES = (torch.float32,)
"""
    (folder / "sitecustomize.py").write_text(begin + "".join(f"    {line}\n" for line in code.strip().splitlines()))
    return os.environ | {"PYTHONPATH": str(folder)}


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@needs_emulation
def test_a_dry_run(tmp_path):
    stages = ["machine", "compile", "correctness", "network", "sampling", "conformance", "tuning"]
    command = [*CHECK, "--minutes", "10", "--out", str(tmp_path / "out"), "--stages", *stages]
    done = subprocess.run(command, capture_output=True, text=True, env=seeded(tmp_path, "pass"), timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path / "out")
    assert set(found) == {"emulation", *stages}
    assert all(result["state"] == "done" and result["rows"] and not result["problems"] for result in found.values())
    assert not list((tmp_path / "out").glob("*.jsonl"))
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as whole:
        assert {f"{stage}.json" for stage in found} | {"correctness-0.log"} <= set(whole.getnames())
    rows = found["correctness"]["rows"]
    assert {row["backend"] for row in rows} == {"cuda", "triton"}
    assert {row["op"] for row in rows} == set(module("gpu.calls").shapes.OPERATORS)
    assert all(0 <= row["largest_error"] < 2e-2 for row in rows)
    assert {row["ceiling"] for row in found["machine"]["rows"] if "ceiling" in row} >= {"copy", "read", "launch"}
    alone = {"conv2d", "channel_moments", "fold_group_norm", "apply_group_norm", "channel_norm", "timestep_embedding"}
    assert {row["op"] for row in rows if row["backend"] == "cuda"} == {row["op"] for row in rows} - alone
    compiled, of_forms = found["compile"]["rows"]
    assert 0 < compiled["compiled"] < compiled["kernels"]
    tuned = found["tuning"]["rows"]
    assert len({row["call"] for row in tuned}) == 3
    assert tuned[-1]["call"].startswith("attention: ")
    assert sum(row["forms"] for row in tuned) > of_forms["forms"] > 0  # a share of them was compiled before
    assert all(row["rule"].startswith("triton") and 0 < row["chosen_us"] <= row["rule_us"] for row in tuned)
    assert not any(row["left_out"] for row in tuned)
    assert tuned[-1]["forms"] == 2
    (kept,) = (tmp_path / "out" / "measured").iterdir()
    assert {row["call"] for row in tuned} == json.loads(kept.read_text())["calls"].keys()
    networks = {row["variant"]: row for row in found["network"]["rows"]}
    assert all(row["launches"] > 50 and row["replayed_us"] > 0 for row in networks.values())
    assert networks["accelerated"]["steps"] > networks["accelerated"]["steps_by_torch"] > 0
    assert networks["accelerated"]["relative_error"] < 2 * networks["torch channels_last"]["relative_error"]
    of = [(row["model"], row["evaluations"]) for row in found["sampling"]["rows"]]
    assert of == [("accelerated", 1), ("plain", 1), ("plain", 2), ("plain", 3)]
    assert found["conformance"]["rows"][0]["passed"] == 12
    table = done.stdout[done.stdout.rindex("\n\n") :].strip().splitlines()
    assert len(table) <= 60
    assert table[-1] == "nothing was wrong"


FAULTS = """
from cmfast.benchmarking import serving
from cmfast.kernels import reference
served = serving.served
def wrong(call, backend, given):
    run = served(call, backend, given)
    if call.op == "group_norm" and backend == "triton":
        return lambda: tuple(1.01 * t for t in run())
    if call.op == "attention" and backend == "cuda" and stage == "correctness":
        os.kill(os.getpid(), signal.SIGSEGV)
    if call.op == "attention" and stage == "operators":  # it is asked for one backend, and another serves
        from cmfast.kernels import backends
        backends.function = lambda name, op: reference.attention
        return served(call, backend, given)
    return run
serving.served = wrong
if stage == "machine":
    device.Emulated.replayed = lambda *_: time.sleep(1e6)
"""


@needs_emulation
def test_faults_are_reported_and_the_other_cases_run(tmp_path):
    stages = ["machine", "correctness", "operators", "sampling"]
    command = [*CHECK, "--minutes", "5", "--out", str(tmp_path / "out"), "--stages", *stages]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=seeded(tmp_path, FAULTS), timeout=400)
    assert time.time() - started < 360
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(tmp_path / "out")

    machine = found["machine"]
    assert machine["state"] == "stopped"
    assert "copy: stopped" in machine["problems"][0]
    assert [row["case"] for row in machine["rows"]] == ["environment"]

    correctness = found["correctness"]
    norms = [r for r in correctness["rows"] if r["op"] == "group_norm" and r["backend"] == "triton"]
    assert norms
    assert all("off by" in row["error"] for row in norms)
    died = [problem for problem in correctness["problems"] if "died by SIGSEGV" in problem]
    assert died
    assert all(problem.startswith("attention ") and " on cuda" in problem for problem in died)
    rest = [r for r in correctness["rows"] if r not in norms]
    assert {(r["op"], r["backend"]) for r in rest} >= {("attention", "triton"), ("consistency_step_backward", "cuda")}
    assert not any(r.get("error") for r in rest)

    for row in found["operators"]["rows"]:
        if row["op"] == "group_norm" and row["backend"] == "triton":
            assert "off by" in row["error"]
        if row["op"] == "attention" and row["backend"] in ("cuda", "triton"):
            assert "cmfast.kernels.reference.attention serves attention" in row["error"]
        assert ("cold_us" in row) == ("error" not in row)
    assert found["sampling"]["state"] == "done"
    assert "wrong (" in done.stdout


def test_a_missing_compiler_is_said_and_triton_is_checked(tmp_path):
    environment = seeded(tmp_path, "pass") | {"CXX": str(tmp_path / "nothing")}
    command = [*CHECK, "--minutes", "3", "--out", str(tmp_path / "out"), "--stages", "correctness"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 1
    rows = results(tmp_path / "out")["correctness"]["rows"]
    assert {"error" in row for row in rows if row["backend"] == "triton"} == {False}
    assert all("and there is no " in row["error"] for row in rows if row["backend"] == "cuda")


def test_what_does_not_compile_is_left_out(tmp_path, monkeypatch):
    check, tried = module("gpu_check"), []

    def attempt(command, environment, seconds, log):
        tried.append({name: environment[name] for name in environment if name.startswith("CMFAST_BUILD")})
        print(f"attempt {len(tried)}: error: what is that?", file=log, flush=True)
        return len(tried) == 2

    monkeypatch.setattr(check, "attempt", attempt)
    result = check.install(tmp_path, False, time.time() + 60)
    assert tried == [{}, {"CMFAST_BUILD_CUDA": "0"}]
    assert result["state"] == "done"
    assert result["problems"] == ["pip: attempt 1: error: what is that?"]
    assert json.loads((tmp_path / "install.json").read_text()) == result
    monkeypatch.setattr(check, "attempt", lambda *arguments: attempt(*arguments) and False)
    assert check.install(tmp_path, False, time.time() + 60)["state"] == "died"


def test_an_installation_that_hangs_is_stopped_with_all_that_it_has_started(tmp_path):
    waits = f"import time; time.sleep(60)  # {tmp_path}"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waits!r}])"
    with (tmp_path / "log").open("w+") as log:
        started = time.time()
        assert not module("gpu_check").attempt([sys.executable, "-c", code], os.environ, 2.0, log)
    assert time.time() - started < 30
    assert (tmp_path / "log").read_text() == "stopped after 2 s\n"
    while processes_that_name(tmp_path):
        assert time.time() - started < 30


def processes_that_name(folder):
    """The processes with the folder in their command, which have not ended."""
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    found = []
    for path in commands:
        with contextlib.suppress(OSError):
            found += [path.parent.name] if str(folder).encode() in path.read_bytes() else []
    return found


@needs_emulation
def test_a_run_that_is_killed_leaves_whole_files(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*CHECK, "--out", str(out), "--stages", "machine", "correctness"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (out / "correctness-1.log").exists():  # the first worker is there
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = results(out)
    assert set(found) == {"emulation", "machine"}
    assert found["machine"]["state"] == "done"
    started = time.time()
    while processes_that_name(out):  # a stage ends with its case
        assert time.time() - started < 60
        time.sleep(0.1)
    journals = [module("gpu.supervisor").read_journal(path) for path in out.glob("correctness-*.jsonl")]
    assert journals
    assert all(len(journal[-1]["left"]) > 10 for journal in journals)


def test_a_journal_that_was_cut_off(tmp_path):
    path = tmp_path / "stage-0.jsonl"
    assert module("gpu.supervisor").read_journal(path) == []
    path.write_text('{"begin": "a"}\n{"end": "a", "ro{"begin": "b"}\n{"end": "b", "rows": []}\n{"begin": "c"')
    assert module("gpu.supervisor").read_journal(path) == [{"begin": "a"}, {"end": "b", "rows": []}]


def test_outcomes_of_tests():
    said = """
tests/a.py::test_x[1 2] PASSED                                           [ 50%]
[gw0] [ 10%] PASSED tests/a.py::test_y[3]
[gw1] [ 20%] FAILED tests/a.py::test_z[a b]
FAILED tests/a.py::test_z[a b] - AssertionError: PASSED
"""
    found = [match.groupdict() for match in module("gpu.conformance")._OUTCOME.finditer(said)]
    assert [(m["kind"] or m["verdict"], m["test"] or m["name"]) for m in found] == [
        ("PASSED", "tests/a.py::test_x[1 2]"),
        ("PASSED", "tests/a.py::test_y[3]"),
        ("FAILED", "tests/a.py::test_z[a b]"),
    ]


def a_run(folder):
    """Results as of a GPU."""
    call = {"op": "group_norm", "shape": "1x2", "layout": "nhwc", "form": "affine", "dtype": "bfloat16"}
    figures = {"cold_us": 4.0, "share": 0.5, "warm_us": 3.0}
    rows = {
        "machine": [{"card": "NVIDIA H100 80GB HBM3", "commit": "abc"}, {"ceiling": "copy", "bytes_per_s": 3e12}],
        "operators": [{**call, "backend": b, **figures} for b in ("cuda", "torch")] * 40,
        "network": [
            {"variant": "cuda", "dtype": "bfloat16", "batch": 1, "called_us": 9e3, "replayed_us": 2e3, "launches": 470},
            {
                "variant": "accelerated",
                "dtype": "float16",
                "batch": 16,
                "called_us": 8e3,
                "launches": 240,
                "steps": 230,
            },
        ],
        "tuning": [
            {"call": "a layer", "rule": "triton", "chosen": form, "rule_us": 8.0, "chosen_us": us}
            for form, us in (("triton", 8.0), ("torch", 6.0))
        ],
    }
    (folder / "measured").mkdir(parents=True)
    (folder / "measured" / "forms-a-card.json").write_text('{"calls": {}}')
    (folder.parent / "measured").mkdir()
    for stage, found in rows.items():
        problems = [f"problem {i}" for i in range(90)] if stage == "network" else []
        result = {"stage": stage, "state": "done", "seconds": 1.0, "problems": problems, "left": [], "rows": found}
        (folder / f"{stage}.json").write_text(json.dumps(result))


def test_the_table_has_at_most_sixty_lines(tmp_path):
    a_run(tmp_path / "run")
    table = module("gpu.table")
    lines = table.lines(table.read(tmp_path / "run"))
    assert len(lines) <= 60
    assert any("4  50%" in line for line in lines)
    assert any("for 1 torch's is the fastest; the most is 0.75 of its time, a layer" in line for line in lines)
    assert lines[-1].endswith("… and 77 more, in the stages' JSON")
    assert any(line.startswith("cuda, bfloat16, batch 1") and "2.000" in line and "470" in line for line in lines)


def results_command(folder, page):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_results.py"), str(folder)]
    command += ["--results", str(folder.parent / "kept"), "--page", str(page)]
    command += ["--measured", str(folder.parent / "measured")]
    return subprocess.run(command, capture_output=True, text=True)


def test_results_are_kept_and_drawn(tmp_path):
    a_run(tmp_path / "run")
    page = tmp_path / "docs" / "gpu.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    begin, end = module("gpu_results").BEGIN, module("gpu_results").END
    page.write_text(f"before\n{begin}\nan older table\n{end}\nafter\n")
    done = results_command(tmp_path / "run", page)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.startswith("nvidia-h100-80gb-hbm3-20")
    stages = {"machine.json", "operators.json", "network.json", "tuning.json"}
    assert {path.name for path in kept.iterdir()} == stages
    picture = f"images/{kept.name}.png"
    assert Image.open(page.parent / picture).format == "PNG"
    assert json.loads((tmp_path / "measured" / "forms-a-card.json").read_text()) == {"calls": {}}
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\nNVIDIA H100 80GB HBM3, ")
    assert text.endswith(f"{end}\nafter\n")
    assert "an older table" not in text
    assert "| cuda | 1 | bfloat16 | 9.00 | 2.00 | 470 |" in text
    assert "| accelerated | 16 | float16 | 8.00 | – | 240 (230 steps) |" in text
    assert "4 (50%)" in text
    assert f"]({picture})" in text


def test_the_legend_has_the_backends_of_all_calls(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    labels, draw = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axes: labels.extend(axes.get_legend_handles_labels()[1]) or draw(axes))
    call = {"op": "conv2d", "layout": "nhwc", "form": "", "dtype": "bfloat16", "cold_us": 3.0, "share": 0.5}
    backends = {"1x2": ("triton", "torch"), "3x4": ("torch", "cuda", "torch.compile")}
    rows = [{**call, "shape": shape, "backend": backend} for shape in backends for backend in backends[shape]]
    module("gpu_results").draw({"operators": {"rows": rows}}, "a card", tmp_path / "a.png")
    assert sorted(labels) == ["cuda", "torch", "torch.compile", "triton"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run, page: (run / "machine.json").unlink(), "has no machine.json and operators.json"),
        (lambda run, page: (run / "emulation.json").write_text((run / "machine.json").read_text()), "a dry run"),
        (lambda run, page: page.write_text("nothing"), "must have the lines"),
    ],
    ids=["incomplete", "dry", "page"],
)
def test_results_that_cannot_be_kept(tmp_path, spoil, message):
    a_run(tmp_path / "run")
    page = tmp_path / "docs" / "gpu.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    page.write_text(f"{module('gpu_results').BEGIN}\n{module('gpu_results').END}\n")
    spoil(tmp_path / "run", page)
    before = page.read_text()
    done = results_command(tmp_path / "run", page)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "kept").exists()
    assert page.read_text() == before


def test_the_committed_page_takes_the_table():
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert text.count(module("gpu_results").BEGIN) == text.count(module("gpu_results").END) == 1


def test_bad_options():
    done = subprocess.run([*CHECK, "--minutes", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--minutes must be more than 0, got 0" in done.stderr


@needs_emulation
def test_a_convolution_is_checked_on_each_backend_that_serves_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("cmfast.kernels.cuda.conv_plan.PROGRAMS", 6)
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    calls, emulated = module("gpu.calls"), module("gpu.device").Emulated("")
    with native.stand_in(emulation.emulated()):
        small, call = (
            calls.shapes.conv_call(1, 40, 0, columns, 8, 3, torch.bfloat16, "affine silu residual moments")
            for columns in (20, 104)
        )
        assert calls.backends_of(small) == ["triton"]
        assert calls.backends_of(call) == ["cuda", "triton"]
        given = calls.values(call, emulated)
        found = tensors(serving.launched(call, "cuda", given)())
        assert 0 < accuracy.judge(call, given, found) < 2e-2
        again = tensors(serving.served(call, "cuda", given)())
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

import csv
import importlib
import importlib.metadata
import json
import pickle
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cmfast import __version__, load
from cmfast.cli import kernels, main, results
from cmfast.cli.bench import latency_report, report
from cmfast.evaluation import Quality, evaluate, load_classifier
from cmfast.evaluation.latency import Latency

from .fixture_files import tiny_unet


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("cmfast.cli.app", lambda **options: torch.empty(1 << 50))
    with pytest.raises(SystemExit, match="2"):
        main()
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("cmfast: ")
    assert "can't allocate memory" in err
    assert err.count("\n") == 1


def test_help_names_the_commands(cmfast):
    status, out, _ = cmfast("--help")
    assert status == 0
    assert all(name in out for name in ("env", "sample", "bench", "convert", "train", "eval"))


def test_version(cmfast):
    assert cmfast("--version")[1].strip() == __version__


def test_env(cmfast):
    status, out, _ = cmfast("env")
    assert status == 0
    assert __version__ in out
    assert "group_norm" in out
    assert "reference" in out
    facts = json.loads(cmfast("env", "--json")[1])
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["backends"]["reference"]["attention"] == "yes"
    assert facts["processor"]["cores"] >= 1


def test_env_is_a_table_with_the_reasons_below(cmfast, monkeypatch):
    answers = {"reference": {"attention": "yes", "conv2d": "yes"}, "cpu": {"attention": "no reason", "conv2d": "yes"}}
    monkeypatch.setattr("cmfast.environment.backend_report", lambda: answers)
    lines = [" ".join(re.sub("[│┃]", " ", line).split()) for line in cmfast("env")[1].splitlines()]
    assert {"operator reference cpu", "attention yes no", "conv2d yes yes", "cpu: no reason"} <= set(lines)
    assert not any(line.startswith("reference: ") for line in lines)
    assert sum("no reason" in line for line in lines) == 1


def test_env_says_how_the_cuda_kernels_were_built(cmfast, monkeypatch):
    def missing():
        raise ImportError("not built")

    monkeypatch.setattr("cmfast.kernels.native.cuda", missing)
    assert "CUDA kernels: not built" in cmfast("env")[1]
    assert json.loads(cmfast("env", "--json")[1])["extensions"]["cuda"] is None
    built = {"architectures": "sm_80, sm_90", "compiler": "nvcc 13.0.88"}
    monkeypatch.setattr("cmfast.kernels.native.cuda", lambda: types.SimpleNamespace(build_info=lambda: built))
    assert "CUDA kernels: sm_80, sm_90, built with nvcc 13.0.88" in cmfast("env")[1]
    assert json.loads(cmfast("env", "--json")[1])["extensions"]["cuda"] == built


def test_env_says_how_the_cpu_kernels_were_built(cmfast, monkeypatch):
    def missing():
        raise ImportError("not built")

    monkeypatch.setattr("cmfast.kernels.native.cpu", missing)
    assert "CPU kernels: not built" in cmfast("env")[1]
    assert json.loads(cmfast("env", "--json")[1])["extensions"]["cpu"] is None
    built = {"isa": "avx2", "isas": "avx2, portable", "compiler": "g++ 12.2.0"}
    module = types.SimpleNamespace(build_info=lambda: built, usable=lambda: "")
    monkeypatch.setattr("cmfast.kernels.native.cpu", lambda: module)
    assert "CPU kernels: avx2 (of avx2, portable), built with g++ 12.2.0" in cmfast("env")[1]
    assert json.loads(cmfast("env", "--json")[1])["extensions"]["cpu"] == built


def test_env_survives_a_missing_package(cmfast, monkeypatch):
    monkeypatch.setattr("cmfast.environment._PACKAGES", ("cmfast", "no-such-package"))
    assert "no-such-package not installed" in " ".join(cmfast("env")[1].split())


def test_sample_writes_picture_and_numbers(cmfast, tmp_path):
    png, npz = tmp_path / "a.png", tmp_path / "new" / "a.npz"
    status, out, _ = cmfast("sample", "--count", 20, "--seed", 3, "--out", png, "--save", npz)
    assert status == 0
    assert str(png) in out
    samples = np.load(npz)["samples"]
    np.testing.assert_array_equal(samples, load("digits").sample(20, seed=3).numpy())
    assert Image.open(png).size == (10 * 66 + 2, 2 * 66 + 2)  # ten classes a row


@pytest.mark.parametrize("steps", [1, 2])
def test_batches_give_the_same_images(cmfast, tmp_path, steps):
    results = {}
    for size in (64, 7, 1):
        path = tmp_path / f"{size}.safetensors"
        arguments = ("--count", 64, "--seed", 1, "--steps", steps, "--batch-size", size, "--no-progress")
        assert cmfast("sample", *arguments, "--save", path)[0] == 0
        results[size] = load_file(path)["samples"]
    for size in (7, 1):
        assert (results[size] - results[64]).abs().max() <= 1 / 255


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--class", "3"), {"class_labels": 3}),
        (("--class", "3,1,4"), {"class_labels": [3, 1, 4]}),
        (("--timesteps", "0,22"), {"timesteps": (0, 22)}),
        (("--sigmas", "80,0.8"), {"sigmas": (80, 0.8)}),
        (("--sampler", "heun", "--steps", 2, "--model", "digits-teacher"), {"sampler": "heun", "steps": 2}),
        (("--first-sample", 5, "--threads", 1), {"first_sample": 5}),
        (("--backend", "reference"), {}),
        (("--dtype", "float32", "--device", "cpu"), {}),
    ],
)
def test_sample_options(cmfast, tmp_path, arguments, options):
    status, _, err = cmfast("sample", "--count", 3, *arguments, "--save", tmp_path / "a.npz")
    assert status == 0, err
    model = load("digits-teacher" if "digits-teacher" in arguments else "digits")
    expected = model.sample(3, **options).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["samples"], expected, rtol=0, atol=1e-4)


def test_sample_with_the_engine(cmfast, tmp_path):
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.2)):
        arguments = ("sample", "--count", 20, "--accelerate", "--dtype", dtype, "--save", tmp_path / "a.npz")
        assert cmfast(*arguments)[0] == 0
        samples = np.load(tmp_path / "a.npz")["samples"]
        np.testing.assert_allclose(samples, load("digits").sample(20).numpy(), atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float16"), "float32 or bfloat16, got torch.float16"),
        (("--backend", "reference"), "on the CPU the engine has the kernels of cpu; ask for one of them"),
    ],
)
def test_what_the_engine_does_not_serve(cmfast, tmp_path, arguments, message):
    status, _, err = cmfast("sample", "--accelerate", *arguments, "--save", tmp_path / "a.npz")
    assert status == 2
    assert message in err
    assert not (tmp_path / "a.npz").exists()


def test_the_engine_is_asked_for_the_backend(cmfast, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cmfast.cli.options.accelerate", lambda model, dtype, backend: asked.append(backend) or model)
    for backend in (("--backend", "cpu"), ()):
        assert cmfast("sample", "--count", 1, "--accelerate", *backend, "--save", tmp_path / "a.npz")[0] == 0
    assert asked == ["cpu", None]


def test_a_plain_sample_has_a_progress_bar_and_one_without_has_none(cmfast, tmp_path):
    arguments = ("sample", "--count", 4, "--batch-size", 2, "--save", tmp_path / "a.npz")
    assert "2/2" in cmfast(*arguments)[2]
    assert cmfast(*arguments, "--no-progress")[2] == ""


def test_a_plain_profile_times_the_steps_and_no_more(cmfast):
    status, out, err = cmfast("profile", "--rounds", 1)
    assert status == 0, err
    assert "group_norms:" not in out
    assert "without" not in out
    assert "memory:" not in out
    _, operators, layers, _ = out.split("\n\n")
    for table in (operators, layers):
        rows = [re.split(r"  +", line.strip())[1:4] for line in table.splitlines()[1:]]
        assert len(rows) > 3
        times = [float(ms) for _, ms, _ in rows]
        assert times == sorted(times, reverse=True)
        assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=1)
    assert "output_blocks.1 " in layers


def test_profile(cmfast, tmp_path):
    path = tmp_path / "profile.json"
    arguments = ("--explain", "--passes", "--memory", "--batch-size", 2, "--depth", 1, "--json", path)
    status, out, err = cmfast("profile", "--rounds", 2, *arguments)
    assert status == 0, err
    assert out.startswith("digits, batch 2, float32 products, ")
    assert "conv 3x3 at 8 x 8, F(" in out
    assert "\noutput_blocks " in out
    assert "group_norms: 25 times. A group norm before convolutions" in " ".join(out.split())
    assert "torch: 1 x aten.embedding, the CPU kernels have no such operator" in " ".join(out.split())
    assert "without residuals:" in out
    found = json.loads(path.read_text())
    assert {"conv2d", "attention", "fold_group_norm"} <= {row["operator"] for row in found["rows"]}
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert found["settings"]["without"].keys() >= {"group_norms", "residuals"}
    settings = {"network": "digits", "batch_size": 2, "dtype": "float32", "eager": False}
    assert settings.items() <= found["settings"].items()
    assert found["rounds"] == 2
    for name in ("operations", "bytes", "floor_seconds"):
        assert found[name] == pytest.approx(sum(row[name] for row in found["rows"]))
    assert found["memory"]["arena_bytes"] == max(step["end_bytes"] for step in found["memory"]["steps"])
    assert f"memory: {found['memory']['arena_bytes'] / 1e6:.2f} MB for values" in out


def test_profile_of_torch_itself_with_its_files(cmfast, tmp_path):
    paths = {option: tmp_path / name for option, name in (("--trace", "a.json"), ("--plot", "a.png"))}
    given = [part for item in paths.items() for part in item]
    status, out, err = cmfast("profile", "--eager", "--rounds", 1, "--dtype", "bfloat16", *given)
    assert status == 0, err
    assert out.startswith("digits, batch 1, torch in bfloat16, ")
    assert "\naten.convolution 3x3 at 8 x 8 " in out
    assert "conv2d" not in out
    names = {event["name"] for event in json.loads(paths["--trace"].read_text())["traceEvents"]}
    assert {"UNet", "input_blocks.1.0", "aten.addmm", "cmfast.group_norm"} <= names
    assert Image.open(paths["--plot"]).format == "PNG"
    assert all(f"wrote {path}" in out for path in paths.values())


@pytest.mark.parametrize(
    ("arguments", "evaluations"),
    [(("--sampling",), 1), (("--steps", 2, "--eager"), 2), (("--sampler", "euler", "--steps", 3), 3)],
)
def test_profile_of_sampling(cmfast, tmp_path, arguments, evaluations):
    path = tmp_path / "a.json"
    status, out, err = cmfast("profile", "--model", "digits", "--rounds", 1, *arguments, "--json", path)
    assert status == 0, err
    stages = {row["stage"] for row in json.loads(path.read_text())["rows"]}
    assert stages == {"noise", "sampler", "outside", *(f"evaluation {i + 1}" for i in range(evaluations))}
    assert "\nstage " in out
    assert "\nunet.output_blocks.1 " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "H100", "--memory", "--eager"), "--plan measures nothing: it does not go with --eager, --memory"),
        (("--eager", "--passes", "--tune"), "--eager leaves the engine out: it does not go with --passes, --tune"),
        (("--steps", 2, "--plot", "a.png"), "--sampling is no single evaluation: it does not go with --plot"),
        (("--sampler", "huen"), "unknown sampler 'huen'"),
        (("--device", "none"), "--device none cannot be used"),
        (("--trace", "/proc/none/a.json"), "no folder in which a.json can be written"),
    ],
)
def test_profiles_that_cannot_be(cmfast, arguments, message):
    status, out, err = cmfast("profile", *arguments)
    assert status == 2
    assert message in err
    assert out == ""


def test_plan(cmfast, tmp_path):
    path = tmp_path / "plan.json"
    status, out, err = cmfast(
        "profile", "--plan", "H200", "--dtype", "float16", "--batch-size", 2, "--depth", 1, "--json", path
    )
    assert status == 0, err
    found = json.loads(path.read_text())
    assert f"digits on H200, float16: {found['launches']} launches" in out
    assert {row["operator"] for row in found["rows"]} >= {"conv2d", "attention", "consistency_step", "aten.embedding"}
    for name in ("flops", "bytes", "floor_seconds"):
        assert found[name] == pytest.approx(sum(row[name] for row in found["rows"]))
    assert found["launches"] == len(found["rows"])
    layers = {line.split()[0]: line.split()[1:] for line in out.split("\n\n")[1].splitlines()}
    in_blocks = [row for row in found["rows"] if row["layer"].startswith("input_blocks.")]
    assert layers["input_blocks"][0] == str(len(in_blocks))
    assert float(layers["input_blocks"][3]) == pytest.approx(1e6 * sum(r["floor_seconds"] for r in in_blocks), abs=0.06)
    assert {"input_blocks.1.0.in_layers.2", "out.2"} <= {row["layer"] for row in found["rows"]}
    settings = {"network": "digits", "batch_size": 2, "gpu": "H200", "dtype": "float16"}
    assert found["settings"] == settings


def test_plan_for_an_unknown_gpu(cmfast):
    status, _, err = cmfast("profile", "--plan", "H10")
    assert status == 2
    assert "--plan must be one of H100, H200, A100, B200, RTX4090, MI300X, got H10" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float16"), "--dtype must be float32 or bfloat16, got float16"),
        (("--network", "imagenet65"), "--network must be one of imagenet64, lsun256, got imagenet65"),
        (("--json", "/proc/none/a.json"), "no folder in which a.json can be written"),
    ],
)
def test_profile_of_what_is_not_there(cmfast, arguments, message):
    status, _, err = cmfast("profile", *arguments)
    assert status == 2
    assert message in err


def malicious(path):
    class Malicious:
        def __reduce__(self):
            return open, (str(path.parent / "ran"), "w")

    path.write_bytes(pickle.dumps({"a": Malicious()}))


def truncated(path):
    torch.save(tiny_unet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no model at"),
        (truncated, "not a whole PyTorch file"),
        (malicious, "something else than tensors"),
        (lambda path: torch.save({"fc.weight": torch.ones(2, 2)}, path), "not the state_dict"),
    ],
)
def test_bad_models_are_one_line(cmfast, tmp_path, write, message):
    write(tmp_path / "m.pt")
    status, out, err = cmfast("sample", "--model", tmp_path / "m.pt", "--out", tmp_path / "a.png")
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", "12"), "0 … 9, got 12"),
        (("--class", "a"), "--class must be integers"),
        (("--class", "1,2"), "or 3 of them"),
        (("--sigmas", "1,2"), "must decrease"),
        (("--sigmas", "x"), "--sigmas must be numbers"),
        (("--timesteps", "22,0"), "must decrease"),
        (("--sampler", "plms"), "unknown sampler"),
        (("--backend", "fast"), "unknown backend"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
        (("--device", "xpu"), "--device xpu cannot be used"),
        (("--save", "a.txt"), "must end in .npz"),
    ],
)
def test_bad_arguments_are_one_line(cmfast, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = cmfast("sample", "--count", 3, "--out", "a.png", "--no-progress", *arguments)
    assert status == 2
    assert message in err
    assert err.startswith("cmfast: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(cmfast):
    status, _, err = cmfast("sample")
    assert status == 2
    assert "--out samples.png" in err


def test_an_unwritable_out(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("cmfast.cli.sample.load_model", lambda *arguments: pytest.fail("that was found out too late"))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "a.png", "/proc/a.png"):
        status, _, err = cmfast("sample", "--out", out)
        assert status == 2
        assert err.count("\n") == 1
    (tmp_path / "folder.png").mkdir()
    assert cmfast("sample", "--out", tmp_path / "folder.png")[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_bench_latency(cmfast, tmp_path):
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "json", "png")}
    status, out, err = cmfast(
        *("bench", "latency", "--consistency-steps", "1,2", "--steps", "3", "--batch-size", 10, "--rounds", 2),
        *("--samplers", "heun,euler", "--csv", files["csv"], "--json", files["json"], "--plot", files["png"]),
    )
    assert status == 0, err
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("consistency, ")] == [
        "consistency, 1 step",
        "consistency, 2 steps",
    ]
    document = json.loads(files["json"].read_text())
    rows = [row for row in document["rows"] if "sampler" in row]
    assert [(r["sampler"], r["evaluations"]) for r in rows] == [
        ("multistep", 1),
        ("multistep", 2),
        ("heun", 5),
        ("euler", 3),
    ]
    assert all(0 <= r["accuracy"] <= 1 and r["seconds"] > 0 for r in rows)
    assert document["environment"]["versions"]["cmfast"] == __version__
    assert document["settings"]["teacher"] == "digits-teacher"
    assert document["settings"]["seed"] == 0
    with files["csv"].open() as stream:
        table = list(csv.DictReader(stream))
    assert [float(r["seconds"]) for r in table if r["sampler"]] == [r["seconds"] for r in rows]
    assert all(r["first"] > 0 and r["seconds_per_sample"] == r["seconds"] / 10 for r in rows)
    assert all(len(r["samples"]["batch"]) == 2 for r in rows)
    assert table[0]["torch"] == importlib.metadata.version("torch")
    assert Image.open(files["png"]).size == (910, 585)
    assert all(f"wrote {path}" in " ".join(out.split()) for path in files.values())


def test_a_plain_bench(cmfast, tmp_path):
    few = ("--consistency-steps", 1, "--steps", 1, "--samplers", "euler")
    status, out, err = cmfast("bench", "latency", *few, "--json", tmp_path / "a.json")
    assert status == 0, err
    assert "milliseconds for 64 samples: median, fastest and slowest of 5" in out
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings.pop("load_s") > 0
    assert settings == {
        "command": "latency",
        "device": "cpu",
        "model": "digits",
        "teacher": "digits-teacher",
        "batch_sizes": "64",
        "rounds": 5,
        "passes": 5,
        "seed": 0,
        "dtype": "float32",
        "backend": "auto",
        "accelerate": False,
    }


def test_the_picture_has_a_line_a_sampler(tmp_path, monkeypatch):
    lines, draw = {}, latency_report._line

    def line(axes, rows, label, **style):
        lines[label] = rows
        draw(axes, rows, label, **style)

    monkeypatch.setattr(latency_report, "_line", line)
    few = [timed("consistency", "multistep", 1, 1, 0.1, 0.9)]
    many = [timed("diffusion", sampler, n, n, 0.9, 0.9) for n in (5, 9) for sampler in ("heun", "euler")]
    latency_report.draw([*few, *many], tmp_path / "a.png", "conditions")
    assert lines == {"diffusion, heun": many[::2], "diffusion, euler": many[1::2], "consistency": few}


def timed(model, sampler, steps, evaluations, seconds, accuracy):
    quality = None if accuracy is None else Quality(accuracy, 2.5, 0.25)
    figures = (seconds, seconds / 2, 2 * seconds, 10 / seconds, quality, 10, None, (seconds / 2, seconds, 2 * seconds))
    return Latency(model, sampler, steps, evaluations, *figures)


def test_the_table_of_latencies(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    few = [timed("consistency", "multistep", 1, 1, 0.1, 0.9), timed("consistency", "multistep", 2, 2, 0.2, 0.97)]
    many = [timed("diffusion", "heun", 5, 9, 0.9, 0.95), timed("diffusion", "heun", 40, 79, 8.0, 0.96)]
    report.show(latency_report.tables([*few, *many]), latency_report.notes([*few, *many]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "milliseconds for 10 samples: median, fastest and slowest of 3"
    assert "consistency 1 1 100 50–200 100 0.900 2.50 0.25" in lines
    assert "heun 40 79 8000 4000–16000 1.25 0.960 2.50 0.25" in lines
    assert lines[-2:] == [
        "consistency, 1 step: 9.0x faster than heun 5 (9 evaluations), the fastest of at least its quality; "
        "80.0x faster than heun 40 (79 evaluations)",
        "consistency, 2 steps: no diffusion row is at least as good; 40.0x faster than heun 40 (79 evaluations)",
    ]
    report.show(latency_report.tables(few[:1]), markdown=True)
    assert capsys.readouterr().out.splitlines() == [
        "milliseconds for 10 samples: median, fastest and slowest of 3",
        "",
        "| sampler | steps | evaluations | first ms | ms | range | samples per s | accuracy | to test | to train |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| consistency | 1 | 1 |  | 100 | 50–200 | 100 | 0.900 | 2.50 | 0.25 |",
    ]
    assert not list(latency_report.notes([timed("consistency", "multistep", 1, 1, 0.1, None)]))  # nothing to say


@pytest.mark.parametrize("accuracy", [None, 0.9])
def test_latencies_are_read_as_they_were_written(accuracy):
    latency = timed("diffusion", "heun", 5, 9, 9.911499999e-3, accuracy)  # rounded first, it would be shown as 9.912 ms
    row = latency_report.row_of(latency)
    document = {"rows": [json.loads(json.dumps(report.entry(row)))]}
    assert [latency_report.latency_of(row) for row in report.rows_of(document)] == [latency]
    del document["rows"][0]["decoding"]  # as of a version that did not measure it
    assert [latency_report.latency_of(row) for row in report.rows_of(document)] == [latency]


def test_rows_in_a_file_name_the_machine(tmp_path, monkeypatch):
    facts = {
        "processor": {"name": "a processor", "threads": 3},
        "gpus": ["one", "another"],
        "extensions": {"cpu": {"isa": "avx2"}},
        "clocks": {"processor": "2 MHz", "governor": "performance"},
        "versions": {"torch": "2.9", "cmfast": "0.1"},
        "commit": "abc",
    }
    for commit, expected in (("abc", "abc"), (None, "")):
        monkeypatch.setattr(results, "describe", lambda commit=commit: {**facts, "commit": commit})
        results.write_csv(tmp_path / "a.csv", [{"x": 1}, {"x": 2, "y": 3}], {"seed": 4})
        with (tmp_path / "a.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert [(row["x"], row["y"]) for row in rows] == [("1", ""), ("2", "3")]
        clocks = "processor 2 MHz; governor performance"
        machine = ["a processor", "avx2", clocks, "3", "one; another", "2.9", "0.1", expected]
        assert [*rows[0].values()][2:-2] == machine
        assert rows[0]["settings"] == '{"seed": 4}'
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", rows[0]["date"])


def test_bench_without_a_measure(cmfast, tmp_path):
    torch.save(
        tiny_unet(model_channels=64, num_head_channels=64, channel_mult=(1, 2, 3, 4)).state_dict(), tmp_path / "m.pt"
    )
    status, _, err = cmfast("bench", "latency", "--model", tmp_path / "m.pt", "--plot", tmp_path / "a.png")
    assert status == 2
    assert "--classifier" in err


def test_eval(cmfast):
    arguments = ("eval", "--count", 50, "--steps", 2, "--resamples", 5)
    status, out, _ = cmfast(*arguments, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["model"], found["count"], found["features"]) == ("digits", 50, "classifier")
    labels = torch.arange(50) % 10
    samples = load("digits").sample(50, steps=2, class_labels=labels)
    values = {m["name"]: m for m in found["measures"]}
    assert list(values) == ["accuracy", "Fréchet to test", "Fréchet to train"]
    expected = evaluate(samples, labels, load_classifier())
    assert [m["value"] for m in values.values()] == pytest.approx(list(expected))
    assert all(m["low"] <= m["value"] <= m["high"] and m["count"] == 50 for m in values.values())
    rows = [" ".join(re.sub("[│┃]", " ", line).split()) for line in cmfast(*arguments)[1].splitlines()]
    accuracy = values["accuracy"]
    assert f"accuracy {accuracy['value']:.3f} {accuracy['low']:.3f} to {accuracy['high']:.3f} 50" in rows
    assert cmfast(*arguments, "--backend", "reference")[0] == 0


def test_eval_beside_real_images(cmfast):
    few = ("--count", 40, "--resamples", 2)
    status, out, _ = cmfast("eval", *few, "--data", "digits", "--train-data", "digits", "--json")
    assert status == 0
    values = {m["name"]: m for m in json.loads(out)["measures"]}
    assert values["Fréchet to data"]["value"] == pytest.approx(values["Fréchet to test"]["value"], rel=1e-2)
    assert values["precision"]["value"] > 0.5
    assert values["recall"]["count"] == 359
    nearest = values["distance to the nearest training image"]
    assert 0.5 < nearest["value"] / nearest["real"] < 2


def test_eval_sweep(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("cmfast.cli.evaluate._ITERATIONS", 2)
    few = ("--count", 20, "--resamples", 2, "--steps", 2)
    status, out, err = cmfast("eval", *few, "--sweep", 2, "--save", tmp_path / "best", "--json")
    assert status == 0, err
    levels = json.loads(out)["levels"]["2"]
    assert levels[0] == 80.0
    assert 0.002 < levels[1] < 80.0
    assert levels != [80.0, 0.5]  # those that it had
    assert load(tmp_path / "best").recommended_levels[2] == tuple(levels)
    assert load(tmp_path / "best").recommended_levels[4] == load("digits").recommended_levels[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--save", "x"), "give --sweep"),
        (("--sweep", 2, "--sampler", "heun"), "leave out --timesteps and --sampler"),
        (("--features", "nowhere"), "no classifier at nowhere"),
        (("--features", "inception"), "pip install torch-fidelity"),
        (("--data", "nowhere"), "no data at nowhere"),
    ],
)
def test_bad_arguments_of_eval(cmfast, arguments, message):
    status, _, err = cmfast("eval", "--count", 10, *arguments)
    assert status == 2
    assert message in err


def test_widths_of_accesses():
    assert (kernels._range(4, 4), kernels._range(4, 16)) == ("4", "4–16")


def test_train(cmfast, tmp_path, monkeypatch):
    from cmfast.training import recipes

    def run(recipe, out, folder, *, resume, progress, say):
        assert (folder, resume) == (None, True)
        say("[what] happens")
        for i in range(3):
            progress("teacher", i + 1, 3, 0.5)
        (out / "digits").mkdir(parents=True)
        (out / "digits" / "README.md").write_text(f"card of {recipe.name}")

    monkeypatch.setattr(recipes, "run", run)
    status, out, _ = cmfast("train", "--recipe", "digits", "--out", tmp_path / "new", "--resume", "--threads", 1)
    assert status == 0
    assert re.search(r"card of digits", out)


def test_numbers_in_a_file_whose_ending_is_in_capitals(cmfast, tmp_path):
    assert cmfast("sample", "--count", 2, "--out", tmp_path / "a.png", "--save", tmp_path / "a.NPZ")[0] == 0
    assert np.load(tmp_path / "a.NPZ")["samples"].shape == (2, 1, 8, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.NPZ", "a.png"]


def test_samples_that_are_no_numbers_are_one_line(cmfast, tmp_path):
    model = load("digits")
    torch.nn.init.constant_(model.unet.out[2].bias, float("nan"))
    model.save(tmp_path / "damaged")
    sample = ("sample", "--no-progress", "--count", 2)
    for command in (
        (*sample, "--out", tmp_path / "a.png"),
        (*sample, "--save", tmp_path / "a.npz"),
        (*sample, "--out", tmp_path / "bulk", "--dtype-out", "float32"),
        ("eval", "--count", 20),
    ):
        status, _, err = cmfast(*command, "--model", tmp_path / "damaged")
        assert status == 2
        assert "samples are not finite" in err
        assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bulk", "damaged"]
    assert not any((tmp_path / "bulk").rglob("*.npz"))


def test_where_a_sweep_is_written_is_looked_at_first(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("cmfast.cli.evaluate._sweep", lambda *_: pytest.fail("it began"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for save, message in ((tmp_path / "full", "give --save a new folder"), (tmp_path / "full" / "a", "a new folder")):
        status, _, err = cmfast("eval", "--sweep", 2, "--save", save)
        assert status == 2
        assert message in err
    status, _, err = cmfast("eval", "--data", "digits", "--split", "valid")
    assert (status, err) == (2, "cmfast: --split must be train or test, got valid\n")


def test_a_folder_of_images_is_compared_with_whole(cmfast, tmp_path):
    """It has no split for testing; and another size is found out before the samples are drawn."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(pictures / f"{i}.png")
    status, _, err = cmfast("eval", "--count", 10, "--steps", 1, "--resamples", 2, "--data", pictures)
    assert (status, err) == (0, "")  # a folder of images has no test split
    for i in range(4):
        Image.new("L", (9, 8)).save(pictures / f"{i}.png")
    status, _, err = cmfast("eval", "--train-data", pictures)
    assert status == 2
    assert err == "cmfast: --train-data: the model's samples are [1, 8, 8], the data's [1, 8, 9]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "--plan", "H100", "--network", "imagenet64", "--model", "digits"), "does not go with --model"),
        (("profile", "--plan", "H100", "--threads", 1), "does not go with --threads"),
        (("convert", "digits", "nowhere", "--revision", "main"), "revision='main' is of models on the hub"),
        (("sample", "--device", "meta", "--out", "a.png"), "--device must be cpu or cuda"),
        (("sample", "--no-progress", "--sigmas", "1e200", "--out", "a.png"), "a number is too large: Numerical result"),
        (("eval", "--split", "test"), "--split is of the files of --data: give --data"),
    ],
)
def test_options_without_effect_and_numbers_out_of_range_are_one_line(
    cmfast, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, _, err = cmfast(*arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())

"""The comparison with other projects (benchmarks/peers), as far as it needs none of them."""

import csv
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast.benchmarking.plain_network import plain_operators

from .fixture_files import network

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
try:
    from benchmarks.peers import never_slower
    from benchmarks.peers.case import Case, UnavailableError
    from benchmarks.peers.compare import peers_of, relative_error
    from benchmarks.peers.others import OTHERS
    from benchmarks.peers.worker import PEERS, Peer, module_of
finally:
    sys.path.remove(str(ROOT))


class Operators(TorchDispatchMode):
    """Notes the namespaces of the operators that run."""

    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.namespaces.add(operator.namespace)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["unet_classcond_film_resblockupdown", "unet_uncond_addemb_resblockupdown"])
def test_the_plain_network_is_the_published_one(name):
    unet, data = network(name)
    with torch.no_grad(), plain_operators(), Operators() as operators:
        output = unet(data["x"], data["timesteps"], data.get("y"))
    assert operators.namespaces == {"aten"}
    assert (output - data["output"]).norm() < 1e-5 * data["output"].norm()
    with torch.no_grad(), Operators() as operators:
        unet(data["x"], data["timesteps"], data.get("y"))
    assert "cmfast" in operators.namespaces


@pytest.fixture
def digits(tmp_path):
    case = Case("digits", 2, "fp32", 1, tmp_path)
    case.write()
    return case


def evaluate(peer, case):
    """The output of a peer in this process, beside the definition's."""
    return relative_error(module_of(peer).prepare(case, case.folder)(), case.reference())


def test_diffusers_has_the_network_as_its_own(digits):
    assert evaluate("diffusers", digits) < 1e-5


def test_bfloat16_has_every_time_of_denoising_diffusion():
    time = torch.from_numpy(OTHERS["denoising-diffusion"].arrays(64, np.random.RandomState(0))["time"])
    assert time.shape == (64,)
    assert time.is_floating_point()
    assert len(time.unique()) > 32
    assert torch.equal(time.bfloat16().float(), time)
    assert torch.equal(time.round(), time)


def test_a_file_each():
    peers = {
        path.stem.removeprefix("with_").replace("_", "-") for path in (ROOT / "benchmarks/peers").glob("with_*.py")
    }
    assert set(PEERS) == peers
    assert {"cmfast", "torch", "openvino", "torch-channels-last"} <= set(peers_of("cpu"))
    assert {"cmfast", "torch-compile", "xformers", "flash-attn", "stable-fast", "tensorrt"} <= set(peers_of("cuda"))
    assert not {"openvino", "ncnn", "onnxruntime"} & set(peers_of("cuda"))


@pytest.mark.parametrize("peer", ["xformers", "flash-attn", "stable-fast", "tensorrt"])
def test_peers_of_gpus_say_why_they_are_not_measured(digits, peer):
    with pytest.raises(UnavailableError, match="it is measured on cuda, not on cpu"):
        Peer(peer, digits)
    with pytest.raises(UnavailableError, match="is not installed"):
        Peer(peer, dataclasses.replace(digits, device="cuda"))


class StandIn(types.ModuleType):
    """A package of a peer that is not installed here: `has` are its functions."""

    def __init__(self, name, **has):
        super().__init__(name)
        self.__path__ = []
        self.__dict__.update(has)


def scaled_dot_product(q, k, v):
    """The attention of xFormers and flash-attn, on [N, T, H, D]."""
    return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class Settings:
    """stable-fast's settings, and its compiler."""

    Default = classmethod(lambda cls: cls())


def compile_unet(unet, config):
    assert config.enable_cuda_graph
    return unet


def compile_exported(exported, *, arg_inputs, **settings):
    assert settings["require_full_compilation"]
    return exported.module()


@pytest.mark.parametrize(
    ("peer", "packages"),
    [
        ("xformers", {"xformers.ops": {"memory_efficient_attention": scaled_dot_product}}),
        ("flash-attn", {"flash_attn": {"flash_attn_func": scaled_dot_product}}),
        (
            "stable-fast",
            {
                "sfast.compilers.diffusion_pipeline_compiler": {
                    "CompilationConfig": Settings,
                    "compile_unet": compile_unet,
                }
            },
        ),
        (
            "tensorrt",
            {
                "torch_tensorrt": {"dynamo": types.SimpleNamespace(compile=compile_exported)},
                "torch_tensorrt.dynamo._engine_cache": {"DiskEngineCache": lambda folder, size: None},
            },
        ),
    ],
)
def test_peers_of_gpus_evaluate_the_network(digits, monkeypatch, peer, packages):
    """As far as it can be seen without them: by stand-ins for what is called of their packages."""
    for name, has in packages.items():
        parents = name.split(".")
        for end in range(1, len(parents)):
            monkeypatch.setitem(
                sys.modules, ".".join(parents[:end]), sys.modules.get(".".join(parents[:end])) or StandIn(parents[0])
            )
        monkeypatch.setitem(sys.modules, name, StandIn(name, **has))
    assert evaluate(peer, digits) < 1e-5


def compare(folder, *options):
    """The rows of a run on the digits, by peer."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers.compare",
        "--network",
        "digits",
        "--threads",
        "1",
        "--rounds",
        "1",
    ]
    command += ["--files", str(folder), "--csv", str(folder / "rows.csv"), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with (folder / "rows.csv").open() as file:
        rows = {row["peer"]: row for row in csv.DictReader(file)}
    assert all(f"| {peer} |" in result.stdout for peer in rows)
    return rows


def test_peers_on_the_digits(tmp_path):
    rows = compare(tmp_path, "--dtype", "bf16", "--batch", "2", "--peers", "torch", "onnxruntime")
    torch_row, missing = rows["torch"], rows["onnxruntime"]
    assert 0 < float(torch_row["error"]) < 0.05
    assert float(torch_row["seconds"]) > 0
    assert float(torch_row["ratio"]) == 1
    assert float(torch_row["memory"]) > 0.05
    assert not missing["seconds"]
    assert missing["note"]  # not installed, or no bfloat16: said either way

    reference = tmp_path / "digits-batch2" / "reference.npy"
    np.save(reference, np.load(reference) + 1)
    row = compare(tmp_path, "--dtype", "bf16", "--batch", "2", "--peers", "torch")["torch"]
    assert row["note"] == "its output is wrong"
    assert float(row["error"]) > 0.1
    assert not row["seconds"]


def written(path, network, dtype, batch, milliseconds):
    """A file as `cmfast bench model --json` writes it, of two threads."""
    rows = [
        {
            **{"key": {}, "samples": {}, "problem": "", "control": False},
            **{"variant": name, "batch": batch, "evaluation_s": None if ms is None else ms / 1e3},
        }
        for name, ms in milliseconds.items()
    ]
    settings = {"command": "model", "network": network, "dtype": dtype}
    path.write_text(
        json.dumps({"settings": settings, "environment": {"processor": {"threads": 2}}, "date": "", "rows": rows})
    )


def test_slower_than_torch_is_said(tmp_path, monkeypatch, capsys):
    ours = {"cmfast": 100, "cmfast-eager": 300}
    written(tmp_path / "a-torch-1.json", "a", "float32", 1, ours | {"torch": 400, "torch-channels-last": 320})
    written(tmp_path / "a-torch-2.json", "a", "bfloat16", 1, ours | {"torch": 900, "torch-channels-last": 330})
    written(tmp_path / "b-torch-1.json", "b", "float32", 8, {"cmfast": 2100, "cmfast-eager": None, "torch": 4200})
    monkeypatch.setattr(sys, "argv", ["never_slower", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        never_slower.main()
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | bfloat16 | 1 | 2 | 100 | 300 | 320 | 0.31 | 0.91 |",  # where float32 is torch's best
        "| a | float32 | 1 | 2 | 100 | 300 | 320 | 0.31 | 0.94 |",
        "| b | float32 | 8 | 2 | 2100 |  | 4200 | 0.50 |  |",
    ]
    written(tmp_path / "a-torch-2.json", "a", "bfloat16", 1, ours | {"torch": 299})
    with pytest.raises(SystemExit) as end:
        never_slower.main()
    assert end.value.code == 1
    assert "| a | bfloat16 | 1 | 2 | 100 | 300 | 299 | 0.33 | 1.00 |" in capsys.readouterr().out


def test_a_folder_without_times_of_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["never_slower", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no files"):
        never_slower.main()
    written(tmp_path / "a-torch-1.json", "a", "float32", 1, {"cmfast": 100})
    with pytest.raises(SystemExit, match="nothing of torch for a float32 1 2 threads"):
        never_slower.main()

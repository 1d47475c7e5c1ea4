"""`cmfast sample` with a folder as --out."""

import json
import subprocess

import numpy as np
import pytest
import torch

from cmfast import load
from cmfast.pictures import to_pixels

from .models import files

FEW = ("--count", 30, "--shard-size", 8, "--batch-size", 8)


@pytest.fixture(autouse=True)
def same_threads():
    """The command sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_samples_in_a_folder(cmfast, tmp_path):
    out = tmp_path / "digits"
    status, printed, err = cmfast("sample", *FEW, "--class", 3, "--seed", 1, "--out", out)
    assert status == 0, err
    assert printed == f"4 shards made; {out} has 4 of 4, 30 of 30 samples\n"
    assert "30/30" in err
    made = to_pixels(load("digits").sample(30, class_labels=3, seed=1)).int()
    shards = [np.load(path) for path in sorted(out.glob("*.npz"))]
    samples = torch.from_numpy(np.concatenate([shard["samples"] for shard in shards])).int()
    assert (samples - made).abs().max() <= 1
    assert np.concatenate([shard["labels"] for shard in shards]).tolist() == [3] * 30
    before = files(out)
    assert cmfast("sample", *FEW, "--class", 3, "--seed", 1, "--out", out)[1].startswith("0 shards made; ")
    assert files(out) == before


def test_three_processes_make_the_files_of_one(cmfast, tmp_path, monkeypatch):
    one, three, printed = tmp_path / "one", tmp_path / "three", {}
    arguments = ("sample", *FEW, "--accelerate", "--format", "tar", "--out")
    assert cmfast(*arguments, one)[0] == 0
    for i in (2, 0, 1):
        for variable, value in {"RANK": i, "WORLD_SIZE": 3, "LOCAL_RANK": i, "LOCAL_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(variable, str(value))
        status, printed[i], err = cmfast(*arguments, three)
        assert status == 0, err
        assert ("sampling: " in err) == (i == 0)  # the first one shows the progress of all
    assert printed[2] == f"process 2 of 3: 1 shards made; {three} has 1 of 4, 8 of 30 samples\n"
    assert printed[0] == f"process 0 of 3: 2 shards made; {three} has 3 of 4, 22 of 30 samples\n"
    assert printed[1] == f"process 1 of 3: 1 shards made; {three} has 4 of 4, 30 of 30 samples\n"
    assert files(three) == files(one)


def test_each_process_has_its_share_of_the_cores(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("cmfast.bulk.processes._cores", lambda: 8)
    for variable, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(variable, str(value))
    assert cmfast("sample", *FEW, "--out", tmp_path / "a")[0] == 0
    assert torch.get_num_threads() == 2
    assert cmfast("sample", *FEW, "--out", tmp_path / "a", "--threads", 1)[0] == 0
    assert torch.get_num_threads() == 1


def test_each_process_has_a_gpu_of_its_own(cmfast, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    chosen, asked = [], []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr(
        "cmfast.cli.bulk.load_model", lambda source, device, *rest: asked.append(device) or load(source)
    )
    monkeypatch.setenv("LOCAL_RANK", "6")
    for given in ((), ("--device", "cuda"), ("--device", "cpu")):
        assert cmfast("sample", *FEW, "--out", tmp_path / "a", *given)[0] == 0
    assert asked == ["cuda:2", "cuda:2", "cpu"]
    assert chosen == ["cuda:2", "cuda:2"]


def test_a_run_that_was_begun_elsewhere(cmfast, tmp_path):
    arguments = ("sample", *FEW, "--no-progress", "--out", tmp_path)
    assert cmfast(*arguments)[0] == 0
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["made_by"]["torch"] = "2.0"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    status, _, err = cmfast(*arguments)
    assert status == 0
    assert err == (
        f"cmfast: {tmp_path} was begun elsewhere, last bits may differ: torch 2.0 there, {torch.__version__} here\n"
    )


def one_line(result, message):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("cmfast: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "out", "--save", "a.npz"), "--save writes one file of all samples"),
        (("--out", "out.d"), "out.d must end in .png, .gif, .apng, .wav, or be a folder"),
        (("--out", "a.png", "--format", "png"), "--format png writes a folder, and a.png is the name of a file"),
        (("--out", "a.png", "--shard-size", 8), "need a folder as --out"),
        (("--save", "a.npz", "--processes", 2), "need a folder as --out"),
        (("--out", "out", "--format", "jpg"), "one of npz, png, tar, got 'jpg'"),
        (("--out", "out", "--dtype-out", "int8"), "uint8 or float32, got 'int8'"),
        (("--out", "out", "--process", 2), "--processes must say how many"),
        (("--out", "/proc/none/out"), "/proc/none/out: the folder cannot be made (No such file or directory)"),
    ],
)
def test_bad_arguments_are_one_line(cmfast, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    one_line(cmfast("sample", *FEW, "--no-progress", *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_continued(cmfast, tmp_path):
    arguments = ("sample", *FEW, "--no-progress", "--out", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("x")
    one_line(cmfast(*arguments), "has other files (a.txt) and no manifest.json: give a new or empty folder")
    (tmp_path / "out" / "a.txt").unlink()
    assert cmfast(*arguments)[0] == 0
    one_line(cmfast(*arguments, "--seed", 1), "has samples of other settings: seed 0 there, 1 here")
    one_line(cmfast(*arguments, "--model", "digits-teacher"), "has samples of other settings: weights sha256:")


def test_a_full_disk_is_one_line(cmfast, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        out = tmp_path / "out"
        result = cmfast("sample", *FEW, "--no-progress", "--dtype-out", "float32", "--out", out)
        one_line(result, ".npz: No space left on device")
        assert all(path.suffix in (".npz", ".json") for path in out.iterdir())
        assert all(np.load(path)["samples"].shape[0] == 8 for path in out.glob("*.npz"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)

import csv
import sys

import numpy as np
import pytest
import torch
import yaml

from cmfast import load
from cmfast.preconditioning import EDM, Consistency

NETWORK = (
    "--set",
    "network.model_channels=32",
    "--set",
    "network.channel_mult=[1]",
    "--set",
    "network.num_res_blocks=1",
)
SHORT = ("--set", "loop.iterations=4", "--set", "loop.batch_size=4", "--set", "loop.checkpoint_interval=2")


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(6) % 3)
    return path


def weights(folder):
    return load(folder).state_dict()


def test_a_training_from_the_command(cmfast, images, tmp_path):
    out = tmp_path / "out"
    arguments = ("--method", "diffusion", "--data", images, "--out", out, *NETWORK, *SHORT, "--threads", 1)
    status, printed, err = cmfast("train", *arguments, "--set", "loop.ema_decays=[0.5, 0.9]")
    assert (status, err) == (0, "")
    assert f"{out}: model, ema-0.5, ema-0.9 after 4 updates" in printed
    written = sorted(path.name for path in out.iterdir())
    assert written == ["checkpoints", "config.yaml", "ema-0.5", "ema-0.9", "log.csv", "model"]
    with (out / "log.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["4"]
    said = yaml.safe_load((out / "config.yaml").read_text())
    assert said["network"]["num_classes"] == 3
    assert said["data"] == {"path": str(images), "split": "train", "size": None}

    status, _, err = cmfast("train", *arguments)
    assert status == 2
    assert err == f"cmfast: {out} has a training after 4 updates: resume it (--resume), or name another folder\n"
    status, _, err = cmfast("train", "--config", out / "config.yaml", "--out", out, "--resume", "--set", "loop.seed=1")
    assert status == 2
    assert "cannot be resumed with this: loop.seed is 1, was 0" in err
    assert yaml.safe_load((out / "config.yaml").read_text()) == said

    # What was written says all: the same once more, elsewhere; and a student of it.
    status, printed, _ = cmfast("train", "--config", out / "config.yaml", "--out", tmp_path / "again", "--resume")
    assert status == 0
    assert f"{tmp_path / 'again'} has no checkpoint yet: the training begins" in printed
    for name in ("model", "ema-0.9"):
        first, second = weights(out / name), weights(tmp_path / "again" / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    teacher, student = ("--teacher", out / "ema-0.5"), tmp_path / "student"
    status, _, err = cmfast("train", "--method", "distillation", "--data", images, "--out", student, *teacher, *SHORT)
    assert (status, err) == (0, "")


def test_a_student_of_the_bundled_teacher(cmfast, images, tmp_path):
    out = tmp_path / "out"
    arguments = ("--method", "distillation", "--data", images, "--init-from", "digits-teacher", "--out", out)
    status, _, err = cmfast("train", *arguments, *SHORT, "--set", "loop.iterations=1")
    assert (status, err) == (0, "")
    student = load(out / "ema-0.999")
    assert student.preconditioning == Consistency()
    assert student.num_classes == 10
    assert student.sample(2).shape == (2, 1, 8, 8)
    assert load("digits-teacher").preconditioning == EDM()
    status, _, err = cmfast("train", *arguments[:4], "--init-from", "digits", "--teacher", "digits-teacher",
                            "--out", out, *SHORT, "--set", "loop.iterations=1", "--resume")  # fmt: skip
    assert status == 2
    assert "cannot be resumed with this: init_from is" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to train: give --method and --data, --config, or --recipe digits"),
        (("--method", "diffusion"), "the configuration has no section data: give it, or --data"),
        (("--data", "nowhere"), "the configuration has no section method: give it, or --method"),
        (("--method", "diffusion", "--data", "nowhere"), "no data at nowhere"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: No such file or directory"),
        (("--recipe", "digits", "--method", "diffusion"), "--recipe says everything"),
        (("--recipe", "digits", "--set", "loop.seed=1"), "--recipe says everything"),
        (("--recipe", "digits", "--device", "cpu"), "--recipe says everything"),
        (("--recipe", "digits", "--data", "nowhere"), "brings its data: leave out the folder nowhere"),
        (("--recipe", "fashion"), "the recipe fashion needs --data FOLDER, with Fashion-MNIST's four IDX files"),
        (("--recipe", "fashion", "--data", "nowhere"), "no data at nowhere"),
        (("--recipe", "faces"), "choose one of digits, fashion"),
        (("--method", "diffusion", "--data", "x", "--set", "loop.seed"), "expected SECTION.FIELD=VALUE"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(cmfast, tmp_path, arguments, message):
    status, _, err = cmfast("train", *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_data_leaves_nothing(cmfast, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"no image")
    status, _, err = cmfast("train", "--method", "diffusion", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 2
    assert "1.png is not an image that Pillow can read" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_not_trained_by_several_processes(cmfast, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = cmfast("train", "--recipe", "digits", "--out", tmp_path / "out")
    assert status == 2
    assert err == "cmfast: --recipe is trained by one process: start it without torchrun\n"
    assert not (tmp_path / "out").exists()


def test_without_pyyaml_it_is_said(cmfast, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    status, _, err = cmfast("train", "--method", "diffusion", "--data", images, "--out", tmp_path / "out")
    assert status == 2
    assert err == 'cmfast: configurations are read and written by PyYAML: pip install "cmfast[train]"\n'
    assert not (tmp_path / "out").exists()

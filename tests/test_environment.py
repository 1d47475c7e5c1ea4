import platform
import re
import subprocess
import types
from pathlib import Path

import torch

from cmfast import environment

EPYC = "processor\t: 0\nvendor_id\t: A\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
CPUINFO = "processor\t: 0\nmodel name\t: Some: Processor v3\n\nprocessor\t: 1\nmodel name\t: Other\n"


def test_the_processors_name(monkeypatch):
    for read, expected in (
        (lambda path: CPUINFO, "Some: Processor v3"),
        (lambda path: EPYC, "AMD EPYC (family 25, model 1)"),
        (lambda path: "processor\t: 0\n", platform.processor() or platform.machine()),
        (lambda path: (_ for _ in ()).throw(FileNotFoundError(path)), platform.processor() or platform.machine()),
    ):
        monkeypatch.setattr(Path, "read_text", read)
        assert environment.processor() == expected


def test_the_commit_of_a_checkout_and_of_no_other_place(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "cmfast" / "environment.py"))
    assert environment.commit() is None
    (tmp_path / ".git").mkdir()
    assert environment.commit() is None  # git says that there is none
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    clean = environment.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "file").write_text("x")
    subprocess.run([*git, "add", "file"], check=True)
    assert environment.commit() == f"{clean}-dirty"


def test_gpus_are_described(monkeypatch):
    properties = types.SimpleNamespace(
        name="NVIDIA X", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert environment._gpus() == ["NVIDIA X, 80 GiB, 132 multiprocessors, 9.0"] * 2

    def broken():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert environment._gpus() == ["unusable: the driver is too old"]


def test_the_clocks_as_they_are(monkeypatch):
    texts = {"/proc/cpuinfo": "cpu MHz\t\t: 2445.4\nx\ncpu MHz\t\t: 3100.0\n", "scaling_governor": "performance\n"}

    def read(path):
        return next((text for name, text in texts.items() if str(path).endswith(name)), None) or path.open().read()

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment._clocks() == {"processor": "2445 to 3100 MHz", "governor": "performance"}
    card = types.SimpleNamespace(stdout="1980 MHz, 2619 MHz, 1980 MHz, 71.3 W, 31\n")
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: card)
    assert card.stdout.strip() in environment._clocks().values()

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment._clocks() == {}

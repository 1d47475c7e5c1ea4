"""What docs/bulk.md says is run: each block of code, with fewer samples, and what it names in examples/bulk.

The commands that a cluster has are played by scripts, which start `cmfast` as these do.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmfast import accelerate, load
from cmfast.bulk import Run

from .models import files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bulk.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
#: Of a run here.
COUNT, SHARDS = 1100, 2
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]

#: Scripts by the names of commands. `cmfast` notes its arguments and variables, and the test runs it.
PLAYED = {
    "cmfast": f"""#!{sys.executable} -S
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "JOB_COMPLETION_INDEX")
variables = {{n: v for n, v in os.environ.items() if n in names or n.startswith("SLURM_")}}
note = json.dumps([sys.argv[1:], variables]) + "\\n"
os.write(os.open("calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND), note.encode())
""",
    # The lines that begin with #SBATCH are options, and become variables of the script.
    "sbatch": """#!/bin/bash
export SLURM_NTASKS=$(sed -n 's/^#SBATCH --ntasks=//p' "$1")
export SLURM_CPUS_PER_TASK=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$1")
exec bash "$@"
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait
""",
    # A pod for each index, whose command has the variables of its environment in place of $(NAME).
    "kubectl": f"""#!{sys.executable}
import os, subprocess, sys, yaml
spec = yaml.safe_load(open(sys.argv[3]))["spec"]
container = spec["template"]["spec"]["containers"][0]
variables = {{}}
for entry in container["env"]:
    field = entry["valueFrom"]["resourceFieldRef"]["resource"].split(".")
    variables[entry["name"]] = container["resources"][field[0]][field[1]]
for index in range(spec["completions"]):
    command = container["command"] + container["args"]
    for name, value in variables.items():
        command = [part.replace("$(%s)" % name, value) for part in command]
    environment = os.environ | variables | {{"JOB_COMPLETION_INDEX": str(index)}}
    subprocess.run(command, env=environment, check=True)
""",
}


@pytest.fixture
def play(tmp_path, cmfast, monkeypatch):
    """Run a shell block beside examples/; gives the calls of `cmfast` that it makes, in the order of their processes.

    The first ones are run: as many as there are shards.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    for name, text in PLAYED.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(text):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        found = subprocess.run(["bash", "-euc", text], env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        calls.sort(key=lambda call: [*map(int, call[1].values()), call[0]])
        (tmp_path / "calls").unlink()
        for arguments, variables in calls[:SHARDS]:
            with monkeypatch.context() as patched:
                for name, value in variables.items():
                    patched.setenv(name, value)
                status, out, err = cmfast("sample", *map(small, arguments[1:]))
            assert status == 0, err
        return calls, out

    before = torch.get_num_threads()
    yield run
    torch.set_num_threads(before)


def small(argument):
    """An argument with fewer samples, in a folder that is here."""
    return re.sub(r"=/samples/", "=", re.sub(r"^(--count=)?\d{4,}$", rf"\g<1>{COUNT}", argument))


def block(word, blocks=SHELL):
    """The one block with that word."""
    (found,) = [text for text in blocks if word in text]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of such a run of the digits, accelerated, as one process makes them."""
    folder = tmp_path_factory.mktemp("expected")
    Run(accelerate(load("digits")), folder, COUNT).work()
    return files(folder)


def test_each_block_has_a_test():
    assert len(SHELL) == 7
    assert len(PYTHON) == 2


def test_one_process(play, expected):
    _, out = play(SHELL[0])
    assert out == f"2 shards made; digits has 2 of 2, {COUNT} of {COUNT} samples\n"
    assert files(Path("digits")) == expected
    exec(block("np.load", PYTHON), names := {})
    assert names["images"].shape == (1024, 1, 8, 8)
    assert (names["images"].dtype, names["labels"].dtype) == (np.uint8, np.int64)
    assert names["labels"].shape == (1024,)


def test_torchrun(tmp_path, expected):
    """The command itself, with two processes."""
    (tmp_path / "bin").mkdir()
    for name, module in (("torchrun", "torch.distributed.run"), ("cmfast", "cmfast.cli")):
        code = f"import {module} as module; module.main()"
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\nexec {sys.executable} -c "{code}" "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    plain, timed = (text for text in SHELL if "torchrun" in text)
    assert timed == "time " + plain.replace("--count 100000 --out digits", "--count 200000 --format npz --out rate")
    text = plain.replace("--count 100000", f"--count {COUNT} --no-progress")
    found = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    printed = sorted(line.split(";")[0] for line in found.stdout.splitlines())
    assert printed == ["process 0 of 2: 1 shards made", "process 1 of 2: 1 shards made"]
    assert files(tmp_path / "digits") == expected


def test_by_hand(play):
    calls, out = play(block("by-hand"))
    assert [arguments[-6:] for arguments, _ in calls] == [
        ["--process", i, "--processes", "2", "--threads", "1"] for i in "01"
    ]
    assert out == f"process 1 of 2: 1 shards made; by-hand has 2 of 2, {COUNT} of {COUNT} samples\n"


def test_slurm(play, expected):
    calls, out = play(block("sbatch"))
    variables = [{name: found[name] for name in sorted(found)} for _, found in calls]
    assert [v["SLURM_PROCID"] for v in variables] == list("01234567")
    assert {(v["SLURM_STEP_NUM_TASKS"], v["SLURM_CPUS_PER_TASK"]) for v in variables} == {("8", "4")}
    assert out == f"process 1 of 8: 1 shards made; samples has 2 of 2, {COUNT} of {COUNT} samples\n"
    assert files(Path("samples")) == expected


def test_kubernetes(play, expected):
    calls, out = play(block("kubectl"))
    assert [variables["JOB_COMPLETION_INDEX"] for _, variables in calls] == list("01234567")
    assert all({"--processes=8", "--threads=4"} < set(arguments) for arguments, _ in calls)
    assert out == f"process 1 of 8: 1 shards made; digits has 2 of 2, {COUNT} of {COUNT} samples\n"
    assert files(Path("digits")) == expected


def test_ray(tmp_path, expected):
    pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'cmfast[ray]'")
    text = (
        block("ray_bulk.py")
        .replace("--count 50000", f"--count {COUNT}")
        .replace("python examples", f"{sys.executable} {ROOT}/examples")
    )
    found = subprocess.run(["bash", "-euc", text], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "ray-digits: 2 of 2 shards are there" in found.stdout
    assert files(tmp_path / "ray-digits") == expected


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("Run(", PYTHON), {})
    assert sorted(os.listdir("from-python")) == ["00000000-00001023.npz", "00001024-00001999.npz", "manifest.json"]

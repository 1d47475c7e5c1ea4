import pytest

from cmfast.bulk import Process, process_of
from cmfast.bulk import processes as module

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1", "SLURM_CPUS_PER_TASK": "6"}
POD = {"JOB_COMPLETION_INDEX": "3"}


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 16)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None), {}, Process()),
        ((None, 1), {}, Process()),
        ((2, 5), {}, Process(2, 5)),
        ((None, None), TORCHRUN, Process(5, 8, 1, 4)),
        ((None, 8), TORCHRUN, Process(5, 8, 1, 4)),
        ((None, None), SLURM, Process(2, 3, 1, 6)),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, Process(0, 2, 0, 1)),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Process()),  # an sbatch script, without srun
        ((None, None), SLURM | TORCHRUN, Process(5, 8, 1, 4)),  # torchrun that srun has started
        ((None, 4), POD, Process(3, 4)),
        ((1, 2), TORCHRUN | SLURM | POD, Process(1, 2, 1, 4)),  # what is said wins
        (
            (None, None),
            {"LOCAL_WORLD_SIZE": "32", **TORCHRUN, "RANK": "0"} | {"LOCAL_WORLD_SIZE": "32"},
            Process(0, 8, 1, 1),
        ),
    ],
)
def test_which_process_this_is(given, environment, expected):
    assert process_of(*given, environment) == expected


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ((0, None), {}, "--processes must say how many"),
        ((None, 3), {}, "does not say which of them this is: give --process"),
        ((3, 3), {}, "3 processes are numbered 0 … 2, got 3"),
        ((None, 4), TORCHRUN, "--processes is 4, but torchrun has started 8"),
        ((None, 4), SLURM, "--processes is 4, but Slurm has started 3"),
        ((None, None), POD, "--processes must say how many completions there are"),
        ((None, 3), POD, "3 processes are numbered 0 … 2, got 3"),
        ((None, None), TORCHRUN | {"RANK": "x"}, "the variable RANK must be an integer, got 'x'"),
        ((None, None), TORCHRUN | {"RANK": "8"}, "8 processes are numbered 0 … 7, got 8"),
    ],
)
def test_processes_that_cannot_be(given, environment, message):
    with pytest.raises(ValueError, match=message):
        process_of(*given, environment)


def test_each_process_has_a_gpu():
    assert [Process(4 + i, 8, i).gpu(4) for i in range(4)] == [f"cuda:{i}" for i in range(4)]
    assert Process(5, 8, 1).gpu(1) == "cuda:0"  # a launcher that shows each process its own one alone


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 9})
    assert process_of(environment=TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}).threads == 3

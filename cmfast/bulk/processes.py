"""Which of how many processes this one is, as torchrun, Slurm and Kubernetes say it, and its part of the machine."""

import dataclasses
import os
from collections.abc import Mapping

#: How many processes srun has started. SLURM_NTASKS, how many it could, is an sbatch script's as well, with number 0.
_STEP_TASKS = "SLURM_STEP_NUM_TASKS"
#: What starts processes, and the variables in which it says a process's number and how many there are.
_LAUNCHERS = (("torchrun", "RANK", "WORLD_SIZE"), ("Slurm", "SLURM_PROCID", _STEP_TASKS))
#: The number of a pod of a Kubernetes Job with an index; how many there are is in no variable.
_KUBERNETES = "JOB_COMPLETION_INDEX"


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes that share a run.

    Attributes:
        index: its number, from 0 on.
        count: how many there are, on all machines.
        local_index: its number on its machine: of its GPU.
        threads: its share of the machine's processor cores; None where it is not known that others run here.

    Raises:
        ValueError: a number is out of range.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"{self.count} processes are numbered 0 … {self.count - 1}, got {self.index}")

    def gpu(self, gpus: int) -> str:
        """Its own one of so many GPUs of the machine; shared where there are fewer GPUs than processes."""
        return f"cuda:{self.local_index % gpus}"


def process_of(
    index: int | None = None, count: int | None = None, environment: Mapping[str, str] = os.environ
) -> Process:
    """Which process this is: by the two numbers, else by the variables of torchrun, Slurm or Kubernetes, else alone.

    Args:
        index: of the process.
        count: of the processes. Alone it says how many pods a Kubernetes Job with an index has.
        environment: variables of the process.

    Raises:
        ValueError: one number without the other, numbers out of range, or variables that say something else.
    """
    local = _number(environment, "LOCAL_RANK", _number(environment, "SLURM_LOCALID", 0))
    threads = _threads(environment)
    if index is not None:
        if count is None:
            raise ValueError(f"--process {index} says which process this is: --processes must say how many there are")
        return Process(index, count, local, threads)
    for launcher, number, total in _LAUNCHERS:
        if number in environment and total in environment:
            found = Process(_number(environment, number), _number(environment, total), local, threads)
            if count not in (None, found.count):
                raise ValueError(f"--processes is {count}, but {launcher} has started {found.count} ({total})")
            return found
    if _KUBERNETES in environment:
        if count is None:
            raise ValueError(
                f"{_KUBERNETES} says which pod this is: --processes must say how many completions there are"
            )
        return Process(_number(environment, _KUBERNETES), count, local, threads)
    if count not in (None, 1):
        raise ValueError(
            f"--processes {count} does not say which of them this is: give --process, or start them by torchrun, srun, "
            "or as a Kubernetes Job with an index"
        )
    return Process(local_index=local, threads=threads)


def _threads(environment: Mapping[str, str]) -> int | None:
    """Slurm says what a task may use; torchrun says how many processes share the machine's cores."""
    if "LOCAL_WORLD_SIZE" in environment:
        return max(1, _cores() // max(1, _number(environment, "LOCAL_WORLD_SIZE")))
    if _STEP_TASKS in environment:
        return _number(environment, "SLURM_CPUS_PER_TASK", 1)  # one is Slurm's own default
    return None


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the variable {name} must be an integer, got {text!r}") from error

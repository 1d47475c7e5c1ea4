"""A stage's process: it measures case after case, and writes down what it begins and what it found.

    python -m benchmarks.gpu.correctness FOLDER --until 1790000000 [--worker 0/8] [--emulate]

The journal FOLDER/<stage>-<worker>.jsonl gets a line when a case begins and one when it ends, so that nothing is lost
when the process dies in the middle. A process that is started again leaves out what its journal shows as begun.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from .supervisor import BROKEN, read_journal

#: Seconds that a case may take before it counts as hanging.
PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to be measured.

    Attributes:
        name: unique within the stage.
        work: returns the rows that were found; one that has "error" is wrong.
        patience: seconds after which the supervisor stops it.
        optional: that it is stopped, when time is up, is nothing wrong.
    """

    name: str
    work: Callable[[], list[dict]]
    patience: float = PATIENCE
    optional: bool = False


def main(stage: str, cases: Callable) -> None:
    """Run the cases that `cases(device, folder, until)` lists, as the command line says, until the time is up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--supervisor", type=int, default=os.getppid(), help="the process that it ends with")
    parser.add_argument("--emulate", action="store_true")
    given = parser.parse_args()
    from . import device  # torch is imported here: the environment is to be set before it

    worker, workers = map(int, given.worker.split("/"))
    journal = given.folder / f"{stage}-{worker}.jsonl"
    begun = {line["begin"] for line in read_journal(journal) if "begin" in line}
    with journal.open("a", buffering=1) as file, device.chosen(given.emulate) as chosen:
        work = [case for i, case in enumerate(cases(chosen, given.folder, given.until)) if i % workers == worker]
        _measure([case for case in work if case.name not in begun], file, chosen, given.until, given.supervisor)


def _measure(cases: Iterable[Case], file, device, until: float, supervisor: int) -> None:
    left = list(cases)
    while left and time.time() < until and os.getppid() == supervisor:  # which it does not outlive
        case = left.pop(0)
        print(json.dumps({"begin": case.name, "patience": case.patience, "optional": case.optional}), file=file)
        print(case.name, flush=True)
        start = time.perf_counter()
        try:
            rows = case.work()
        except Exception as error:
            traceback.print_exc()
            rows = [{"error": f"{type(error).__name__}: {error}".strip()}]
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"end": case.name, "seconds": seconds, "rows": rows}), file=file)
        if device.is_broken():
            print("the device does not answer any more: a new process goes on", flush=True)
            sys.exit(BROKEN)
    print(json.dumps({"left": [case.name for case in left]}), file=file)

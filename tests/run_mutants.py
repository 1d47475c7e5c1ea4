"""Do the tests notice? Seed single faults into copies of cmfast/, one a copy, and run the related tests on each.

    python tests/run_mutants.py [--count 240] [--seed 0] [--only cmfast/sampling] [--list]

The kernels have faults of their own, written by hand: tests/kernels/mutants_*.py. A fault is noticed where a test fails
or does not end. tests/mutants_harmless.txt argues faults that change no result; they are left out. The exit status is
1 where in any folder fewer than 90 % of the faults are noticed, or where an argument has lost its line.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import hypothesis  # noqa: F401 - what the tests import is imported once
import matplotlib  # noqa: F401
import sklearn  # noqa: F401
import torch
import triton  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
from forked import ROOT, Fork
from mutants import Mutant, choose, harmless, mutants_of

WANTED = 0.9
HARMLESS = ROOT / "tests" / "mutants_harmless.txt"

#: What is tested of the files whose paths begin so, the first that fits, after the tests of the file's own name.
RELATED = {
    "cmfast/sampling/": ("tests/sampling",),
    "cmfast/bulk/": tuple(
        f"tests/bulk/test_{name}.py" for name in ("shards", "processes", "manifest", "unfinished", "run", "cli")
    ),
    "cmfast/serving/": tuple(
        f"tests/serving/test_{name}.py"
        for name in ("batches", "batching", "requests", "evaluation", "worker_process", "connections")
    ),
    "cmfast/cli/serve.py": ("tests/serving/test_lifecycle.py",),
    "cmfast/training/methods/": ("tests/training/methods",),
    "cmfast/training/": ("tests/training",),
    "cmfast/evaluation/": ("tests/test_evaluation.py",),
    "cmfast/benchmarking/": ("tests/benchmarking", "tests/test_cli_bench.py"),
    "cmfast/cli/bench/": ("tests/test_cli_bench.py", "tests/test_cli.py"),
    "cmfast/engine/passes/": tuple(
        f"tests/engine/test_{name}.py" for name in ("passes", "spellings", "homemade", "patterns")
    ),
    "cmfast/engine/patterns/": tuple(
        f"tests/engine/test_{name}.py" for name in ("spellings", "patterns", "convolutions", "passes")
    ),
    "cmfast/engine/cpu/": tuple(f"tests/engine/test_{name}.py" for name in ("homemade", "accelerate", "drop_in")),
    "cmfast/engine/cuda/replay.py": ("tests/engine/cuda/test_replay_streams.py",),
    "cmfast/engine/cuda/": ("tests/engine/cuda",),
    "cmfast/engine/accelerator.py": tuple(
        f"tests/engine/test_{name}.py" for name in ("parts", "drop_in", "accelerate")
    ),
    "cmfast/engine/dtypes.py": ("tests/engine/cuda",),
    "cmfast/engine/nvtx.py": ("tests/engine/cuda/test_executable.py", "tests/profiling/test_recording.py"),
    "cmfast/engine/explanation.py": ("tests/engine/test_explain.py",),
    "cmfast/engine/trace.py": ("tests/engine/test_explain.py", "tests/engine/test_parts.py"),
    "cmfast/engine/": tuple(f"tests/engine/test_{name}.py" for name in ("drop_in", "homemade", "accelerate")),
    "cmfast/cli/kernels.py": ("tests/kernels/test_static.py",),
    "cmfast/cli/convert.py": ("tests/checkpoints/test_convert.py",),
    "cmfast/cli/": ("tests/test_cli.py", "tests/test_cli_profile_from.py"),
    "cmfast/profiling/": ("tests/profiling",),
    "cmfast/profile.py": ("tests/profiling/test_profile.py",),
    "cmfast/explain.py": ("tests/engine/test_explain.py",),
    "cmfast/pipelines.py": ("tests/engine/test_pipelines.py",),
    "cmfast/accelerate.py": ("tests/engine/test_accelerate.py", "tests/engine/test_drop_in.py"),
    "cmfast/environment.py": ("tests/test_cli.py",),
    "cmfast/checkpoints/": ("tests/checkpoints",),
    "cmfast/replay.py": ("tests/engine/cuda/test_replay.py",),
    "cmfast/storage.py": ("tests/checkpoints",),
    "cmfast/unet.py": ("tests/test_unet.py", "tests/checkpoints"),
    "cmfast/": ("tests/test_model.py",),
}
#: Left out: they take most of the time, and others look at the same.
SLOW = ("tests/engine/test_drop_in.py::test_every_large_write_through_data_has_its_effect",)


def tests_of(file: str) -> list[str]:
    """pytest's arguments for a file of cmfast/."""
    path = Path(file).relative_to("cmfast")
    own = Path("tests", path.parent, f"test_{path.stem}.py")
    related = next(tests for prefix, tests in RELATED.items() if file.startswith(prefix))
    first = [str(own)] if (ROOT / own).exists() else []
    return list(dict.fromkeys([*first, *related]))


def run_all(jobs: list[tuple[Mutant | None, list[str], float]], at_once: int):
    """Run the tests on a copy for each (fault or none, arguments, seconds); yield (job, result) as they end."""
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant, arguments, seconds = job = waiting.pop()
            change = mutant.seed if mutant else lambda tree: None
            fork = Fork.start(change, [*arguments, *(f"--deselect={test}" for test in SLOW)], seconds)
            running[fork.process] = job, fork
        process, status = os.wait()
        job, fork = running.pop(process)
        yield job, fork.result(status)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=240, help="about how many faults [240]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice [0]")
    parser.add_argument("--only", default="", metavar="FOLDER", help="those of files whose paths begin so")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once [one a core]")
    options = parser.parse_args()

    sources = {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "cmfast").rglob("*.py"))}
    argued = harmless(HARMLESS.read_text())
    there = {m.key for file in {key[0] for key in argued} & set(sources) for m in mutants_of(file, sources[file])}
    lost = argued.keys() - there
    chosen = [m for m in choose(sources, options.count, options.seed) if m.file.startswith(options.only)]
    left = [m for m in chosen if m.key not in argued]
    if options.list:
        print(*left, sep="\n")
        return 0

    # The tests must pass without a fault; the time that takes bounds that of a run with one.
    sets = {frozenset(tests_of(m.file)): tests_of(m.file) for m in left}
    seconds, begin = {}, time.monotonic()
    for (_, arguments, _), result in run_all([(None, arguments, 3600) for arguments in sets.values()], options.jobs):
        if result["status"] != 0:
            print(result["log"], f"The tests {' '.join(arguments)} fail without a fault.", sep="\n")
            return 1
        seconds[frozenset(arguments)] = 60 + 3 * (time.monotonic() - begin)

    folders, noticed, survivors = Counter(), Counter(), []
    jobs = [(m, tests_of(m.file), seconds[frozenset(tests_of(m.file))]) for m in left]
    for (mutant, _, _), result in run_all(jobs, options.jobs):
        folder = str(Path(mutant.file).parent)
        folders[folder] += 1
        noticed[folder] += result["status"] != 0
        if result["status"] == 0:
            survivors.append(mutant)
        print("survives" if result["status"] == 0 else "noticed ", mutant, result["first"], flush=True)

    print(f"\n{len(chosen) - len(left)} of {len(chosen)} faults are harmless: {HARMLESS.relative_to(ROOT)}")
    for folder in sorted(folders):
        print(
            f"{folder:28} {noticed[folder]:4} of {folders[folder]:4} noticed, {noticed[folder] / folders[folder]:4.0%}"
        )
    for mutant in sorted(survivors):
        print("survives", mutant)
    for key in sorted(lost):
        print("harmless no more, its line is gone:", *key, sep=" :: ")
    return int(bool(lost) or any(noticed[folder] < WANTED * count for folder, count in folders.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

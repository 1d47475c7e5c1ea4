"""Everything worth knowing about an NVIDIA GPU, in one call of a few minutes:

    python3 benchmarks/gpu_check.py --install --minutes 8 --out DIR

--install first installs this checkout, compiled for the GPU that is there, without a network: torch, triton, nvcc and
pytest must be there. What does not compile is left out, and said. Then stage by stage, each bounded and in processes of
its own, with its own JSON and logs in DIR the moment it ends, and all of these in DIR/results.tar.gz:

    machine      the card as found, and its ceilings: copy, read, matrix products, launches
    compile      Triton's kernels of the accelerated network, by several processes at once
    correctness  every operator × backend × dtype, forward and backward, against float64; twice, bit-identical
    operators    their times at the networks' shapes, cold and warm, beside torch and torch.compile
    network      one evaluation of the ImageNet 64 network, accelerated and plain: time, launches, memory, a trace
    sampling     one consistency step, two, and Heun's 40, accelerated and plain
    conformance  the operators' tests, and compute-sanitizer, as long as its share of the time lasts
    tuning       the network's calls in other forms than the rule's, and torch's convolution; kept as a file to commit

A table of what was found ends the output; the exit status is 1 where anything was wrong. `--emulate` goes the same way
without a GPU, on Triton's interpreter and csrc/emulation, with small sizes: its times say nothing.
`benchmarks/gpu_results.py DIR` keeps what a run found and draws it.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.supervisor import run_stage, stop_group, write_json  # noqa: E402

#: stage: (parts of the time that is left, by those of the stages that are to come; processes, and in the dry run).
STAGES = {
    "machine": (4, 1, 1),
    "compile": (14, 8, 1),
    "correctness": (18, 8, 2),
    "operators": (24, 1, 1),
    "network": (26, 1, 1),
    "sampling": (8, 1, 1),
    "conformance": (15, 1, 1),
    "tuning": (8, 1, 1),
}


def main() -> int:
    """Install, run the stages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="install this checkout first, for this GPU, offline")
    parser.add_argument("--minutes", type=float, help="for everything, the installation too (8; the dry run 2.5)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="the folder of the results (out/gpu)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--emulate", action="store_true", help="a dry run without a GPU")
    given = parser.parse_args()
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {given.minutes:g}")
    until = time.time() + 60 * (given.minutes or (2.5 if given.emulate else 8))
    if not given.emulate and not has_gpu():
        parser.error("there is no NVIDIA GPU here that torch can use; --emulate goes the same way without one")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in table.STAGES:
        (out / f"{old}.json").unlink(missing_ok=True)
    results = {}

    def ended(result: dict) -> None:
        results[result["stage"]] = result
        say(result)
        bundle(out)

    if given.install:
        ended(install(out, given.emulate, until))
    if given.emulate:
        ended(run_stage("emulation", out, until - time.time(), emulate=True))
    chosen = [stage for stage in STAGES if stage in given.stages]
    for i, stage in enumerate(chosen):
        share, workers, dry_workers = STAGES[stage]
        seconds = max(until - time.time(), 1) * share / sum(STAGES[s][0] for s in chosen[i:])
        workers = dry_workers if given.emulate else workers
        ended(run_stage(stage, out, seconds, workers=workers, emulate=given.emulate))
    print("\n".join(("", *table.lines(results))), flush=True)
    return 1 if table.problems(results) else 0


def has_gpu() -> bool:
    """Whether torch sees one, asked in a process of its own: this one may not hold a part of the card."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


#: What is compiled, and then what is left out where that fails or takes too long.
BUILDS = ({}, {"CMFAST_BUILD_CUDA": "0"}, {"CMFAST_BUILD_CUDA": "0", "CMFAST_BUILD_CPU": "0"})
#: The part of the time that is left which one attempt to install may take.
INSTALLING = 0.35


def install(out: Path, emulate: bool, until: float) -> dict:
    """Install the checkout as it is, with what is already there; the stages that follow say what is missing."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-e", str(ROOT)]
    environment = dict(os.environ)
    environment.setdefault("CMFAST_CUDA_ARCHITECTURES", "native")
    start, problems, installed = time.time(), [], False
    with (out / "install.log").open("w+") as log:
        for left_out in BUILDS[1:] if emulate else BUILDS:
            begin = log.tell()
            installed = attempt(command, environment | left_out, INSTALLING * (until - time.time()), log)
            if installed:
                break
            log.seek(begin)
            said = log.read().strip().splitlines()
            without = f" without {', '.join(left_out)}" if left_out else ""
            problems.append(f"pip{without}: {' '.join(said[-3:])}")
    result = {
        "stage": "install",
        "state": "done" if installed else "died",
        "seconds": round(time.time() - start, 1),
        "problems": problems,
        "left": [],
        "rows": [],
    }
    write_json(out / "install.json", result)
    return result


def attempt(command: list[str], environment: dict[str, str], seconds: float, log: TextIO) -> bool:
    """Whether a command ends well, within so many seconds; what it says, and how it ends, goes to the log."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        how = f"exit status {process.wait(max(seconds, 1.0))}"
    except subprocess.TimeoutExpired:
        how = f"stopped after {seconds:.0f} s"
    stop_group(process.pid)
    process.wait()
    log.seek(0, os.SEEK_END)
    print(how, file=log, flush=True)
    return process.returncode == 0


def bundle(out: Path) -> None:
    """Put all that is there so far into one file, whole at each moment."""
    fresh = out / ".results.tar.gz"
    with tarfile.open(fresh, "w:gz") as file:
        for path in sorted(out.iterdir()):
            if not path.name.startswith((".", "results.tar")):
                file.add(path, path.name)
    fresh.replace(out / "results.tar.gz")


def say(result: dict) -> None:
    """Report a stage that ended, in a line, and what was wrong in it."""
    print(
        f"{result['stage']}: {result['state']} after {result['seconds']:.1f} s, {len(result['rows'])} rows", flush=True
    )
    for problem in result["problems"][:10]:
        print(f"  {problem[:300]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

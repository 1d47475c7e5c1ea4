"""One network evaluation of cmfast beside that of other projects, in one interleaved run.

    python -m benchmarks.peers.compare --network imagenet64 --dtype fp32 --threads 2

Each peer is set up as its documentation recommends for latency and runs in a process of its own. Its output is
checked against the definition in float64; a wrong one is shown and not timed. Then the peers take turns, one at a
time, each of which waits until the machine is idle, and is repeated where it did not stay so.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cmfast.cli.results import write_csv

from .case import NETWORKS, Case
from .worker import PEERS, devices

ROOT = Path(__file__).resolve().parents[2]
#: Relative errors (of the norm) above which an output is wrong.
WRONG = {"fp32": 1e-3, "bf16": 5e-2}
#: Seconds that a turn waits at most for an idle machine.
PATIENCE = 3
#: Cores that other processes may use; a turn in which they use more is repeated, so many times.
QUIET, TRIES = 0.1, 3


class PeerError(Exception):
    """A peer that was not measured, and why."""


class Worker:
    """The process of a peer (see `worker`)."""

    def __init__(self, peer, case):
        self.log = case.folder / f"{peer}-{case.device}-{case.dtype}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker", peer, case.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(case.threads)},
                start_new_session=True,  # Ctrl-C is for `take_turns`, which keeps what is measured
            )

    def ask(self, request):
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is still to be read
            print(request, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"ended by {_status(self.process.wait())} in {request} (see {self.log})")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def cpu_seconds(self):
        """What all its threads have used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        """Close its input, on which it ends."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _status(code):
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def start(peer, case, exact):
    """(worker, row) of a peer that is ready for its turns; the worker is None where the row says why it is not."""
    row = {"peer": peer, "version": "", "conversion": None, "start": None, "error": None, "note": ""}
    worker = Worker(peer, case)
    try:
        row |= worker.ask("convert")
        worker.end()  # with the memory that the conversion took
        worker = Worker(peer, case)
        started = worker.ask("start")
        row["start"] = started["start"]
        row["error"] = relative_error(np.load(started["output"]), exact)
        if not row["error"] < WRONG[case.dtype]:
            raise PeerError("its output is wrong")
    except PeerError as reason:
        worker.end()
        return None, {**row, "note": str(reason)}
    return worker, row


def peers_of(device):
    """The peers that can be measured on a device."""
    return [peer for peer in PEERS if device in devices(peer)]


def relative_error(output, exact):
    if output.shape != exact.shape:
        raise PeerError(f"its output is {list(output.shape)}, expected {list(exact.shape)}")
    return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


def cpu_seconds():
    """What all processes of this machine have used of it, and other machines on the same host have taken."""
    user, nice, system, _, _, *interrupts_and_stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def quiet_turn(worker):
    """(cores that others used meanwhile, seconds of a call): the quietest of a few turns, mostly the first."""
    turns = []
    for _ in range(TRIES):
        wait_for_an_idle_machine()
        began, busy, own = time.perf_counter(), cpu_seconds(), worker.cpu_seconds()
        seconds = worker.ask("turn")["seconds"]
        others = cpu_seconds() - busy - (worker.cpu_seconds() - own)
        turns.append((others / (time.perf_counter() - began), seconds))
        if turns[-1][0] < QUIET:
            break
    return min(turns)


def wait_for_an_idle_machine():
    """Until 0.2 s pass that are quiet: OpenMP's and ONNX Runtime's threads spin after a call."""
    for _ in range(round(PATIENCE / 0.2)):
        before = cpu_seconds()
        time.sleep(0.2)
        if cpu_seconds() - before < 0.2 * QUIET:
            return


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the rounds; `rows` are those of `measure`, of the rounds that were done."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows


def measure(case, peers, rounds, say=print):
    """A row a peer: version, seconds, those of each round, ratio to the fastest, error, memory in GB, time to start.

    Raises:
        Interrupted: Ctrl-C ended the rounds.
    """
    case.write()
    exact = case.reference()
    rows, workers = {}, {}
    for peer in peers:
        say(f"starting {peer}")
        worker, rows[peer] = start(peer, case, exact)
        rows[peer] |= {"seconds": None, "ratio": None, "memory": None, "rounds": []}
        if worker:
            workers[peer] = worker
    results, interrupted = take_turns(workers, rounds, say)
    for peer, result in results.items():
        rows[peer] |= result
        workers[peer].end()
    fastest = min((row["seconds"] for row in rows.values() if row["seconds"]), default=None)
    for row in rows.values():
        row["ratio"] = row["seconds"] and row["seconds"] / fastest
    if interrupted:
        raise Interrupted(list(rows.values()))
    return list(rows.values())


def take_turns(workers, rounds, say):
    """For each peer its rounds' seconds of a call, their median and the peak memory, or the reason why it has none.

    And whether Ctrl-C ended the rounds: fewer are there then.
    """
    times, results, worst, interrupted = {peer: [] for peer in workers}, {}, 0.0, False
    try:
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            for peer in [peer for peer in workers if peer not in results]:
                try:
                    disturbance, seconds = quiet_turn(workers[peer])
                except PeerError as reason:
                    results[peer] = {"note": str(reason)}
                else:
                    times[peer].append(seconds)
                    worst = max(worst, disturbance)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: the rounds that were done are kept")
    say(f"other processes took at most {worst:.0%} of a core during a turn")
    for peer in workers.keys() - results.keys():
        seconds = statistics.median(times[peer]) if times[peer] else None
        results[peer] = {"seconds": seconds, "rounds": times[peer], **_memory(workers[peer])}
    return results, interrupted


def _memory(worker):
    """Its peak; none of a worker that was interrupted in a turn, whose answer is still to come."""
    try:
        return {"memory": worker.ask("memory").get("memory")}
    except PeerError:
        return {"memory": None}


#: heading of the table: (field, format)
COLUMNS = {
    "peer": ("peer", "s"),
    "version": ("version", "s"),
    "ms": ("ms", ".1f"),
    "of the fastest": ("ratio", ".2f"),
    "error": ("error", ".1e"),
    "peak GB": ("memory", ".2f"),
    "start s": ("start", ".1f"),
    "first start s": ("conversion", ".0f"),
    "": ("note", "s"),
}


def table(rows):
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        row = {**row, "ms": row["seconds"] and 1e3 * row["seconds"], "note": row["note"].partition("\n")[0]}
        cells = ("" if row[field] is None else format(row[field], spec) for field, spec in COLUMNS.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=NETWORKS, default="imagenet64")
    arguments.add_argument("--dtype", choices=WRONG, default="fp32")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"{', '.join(PEERS)}; by default those of the device"
    )
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument(
        "--files", type=Path, default=ROOT / "out" / "peers", help="where converted networks are kept"
    )
    arguments.add_argument("--csv", type=Path, help="write the rows, with the machine and the commit, to this file")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    case = Case(given.network, given.batch, given.dtype, given.threads, given.files.resolve(), given.device)
    peers, say = given.peers or peers_of(given.device), lambda line: print(line, file=sys.stderr, flush=True)
    try:
        rows = measure(case, peers, given.rounds, say)
    except Interrupted as stop:
        rows = stop.rows
    where = f"{given.threads} threads" if given.device == "cpu" else torch.cuda.get_device_name()
    settings = f"{given.network}, batch {given.batch}, {given.dtype}, {where}"
    print(f"{settings}, median of {given.rounds} rounds\n\n{table(rows)}")
    if given.csv:
        settings = {name: getattr(given, name) for name in ("network", "device", "dtype", "batch", "rounds")}
        write_csv(given.csv, [{**settings, **row, **settings} for row in rows])


if __name__ == "__main__":
    main()

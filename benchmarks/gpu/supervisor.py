"""Runs a stage in processes of its own, stops what hangs, starts again after what died: standard library only."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The exit status of a stage whose device does not answer any more; a new process may go on.
BROKEN = 70
#: Seconds that a stage may go on past its share to end the case that it is in.
GRACE = 5.0
#: How often a stage is started again after it died.
RESTARTS = 10
#: Seconds that a process may take before its first case: torch is imported, and the dry run compiles its emulation.
START = 150.0


def run_stage(stage: str, folder: Path, seconds: float, *, workers: int = 1, emulate: bool = False) -> dict:
    """Run `python -m benchmarks.gpu.<stage>` for at most so many seconds; FOLDER/<stage>.json has what this returns.

    The result has `state` ("done", "out of time", "stopped" or "died"), `seconds`, `rows`, `problems` (sentences) and
    `left` (cases that were not begun).
    """
    start = time.time()
    until = start + seconds
    running = [_Worker(stage, folder, f"{i}/{workers}", until, emulate) for i in range(workers)]
    try:
        while any([worker.goes_on() for worker in running]):
            time.sleep(0.05)
    finally:
        for worker in running:
            worker.kill()
    result = _result(stage, running, round(time.time() - start, 1))
    write_json(folder / f"{stage}.json", result)
    for worker in running:
        worker.journal.unlink(missing_ok=True)
    return result


class _Worker:
    """One of the processes of a stage, and its journal."""

    def __init__(self, stage: str, folder: Path, number: str, until: float, emulate: bool) -> None:
        self.until, self.problems, self.starts, self.stopped = until, [], 0, False
        name = f"{stage}-{number.split('/')[0]}"
        self.journal, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.journal.unlink(missing_ok=True)
        self.log.write_text("")
        self.command = [sys.executable, "-m", f"benchmarks.gpu.{stage}", str(folder), "--until", str(until)]
        self.command += ["--supervisor", str(os.getpid()), "--worker", number, *(["--emulate"] if emulate else [])]
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.since = time.time()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def goes_on(self) -> bool:
        """Whether it still has work; what hangs is stopped here, and what died is started again."""
        status = self.process.poll()
        if status == 0:
            return False
        now, case = time.time(), self.current()
        if status is None:
            patience = case["patience"] if case else START
            began = max(self.since, case["at"]) if case else self.since
            if now < self.until + GRACE and now - began < patience:
                return True
            self.kill()
            what = f"{now - began:.0f} s after it began" if case else "before its first case"
            if not (case and case["optional"]):
                self.problems.append(f"{case['begin'] if case else 'start'}: stopped {what}")
            self.stopped = True
        elif status == BROKEN:
            self.problems.append(f"{self.last_begun()}: the device did not answer any more")
        else:
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            self.problems.append(f"{self.last_begun()}: the process died by {how}: {self.last_words()}")
        if now > self.until - 3 or self.starts > RESTARTS or not self.lines():
            return False
        self.start()
        return True

    def lines(self) -> list[dict]:
        return read_journal(self.journal)

    def current(self) -> dict | None:
        """The case that was begun and has not ended, with the time when its line was written."""
        lines = self.lines()
        if not lines or "begin" not in lines[-1]:
            return None
        return {**lines[-1], "at": self.journal.stat().st_mtime}

    def last_begun(self) -> str:
        return next((line["begin"] for line in reversed(self.lines()) if "begin" in line), "start")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"

    def kill(self) -> None:
        """End it, and what it has started and left behind, which would disturb what is measured next."""
        running = self.process.poll() is None
        stop_group(self.process.pid)
        if running:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.problems.append("a process does not end: the driver hangs")


def _result(stage: str, workers: list[_Worker], seconds: float) -> dict:
    lines = [line for worker in workers for line in worker.lines()]
    ended = [line for line in lines if "end" in line]
    rows = [{"case": line["end"], **row} for line in ended for row in line["rows"]]
    problems = [problem for worker in workers for problem in worker.problems]
    problems += [f"{row['case']}: {row['error']}" for row in rows if row.get("error")]
    left = [name for line in lines for name in line.get("left", ())]
    died = any(worker.process.returncode for worker in workers)
    stopped = any(worker.stopped for worker in workers)
    state = "stopped" if stopped else "died" if died else "out of time" if left else "done"
    return {
        "stage": stage,
        "state": state,
        "seconds": seconds,
        "cases": len(ended),
        "case_seconds": {line["end"]: line["seconds"] for line in ended},
        "problems": problems,
        "left": left,
        "rows": rows,
    }


def stop_group(leader: int) -> None:
    """Kill the processes of a group, of which none may be left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def read_journal(path: Path) -> list[dict]:
    """The whole lines of a journal; the last one may be half written."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # two processes wrote: the first was stopped in the middle of a line
            continue
    return found


def write_json(path: Path, value: object) -> None:
    """Write the file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(value, indent=1) + "\n")
    fresh.replace(path)

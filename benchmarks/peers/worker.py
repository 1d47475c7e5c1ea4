"""One peer in a process of its own, so that its memory and its threads are its own: what `compare.Worker` talks to.

    python -m benchmarks.peers.worker PEER CASE

Each line of standard input is a request, answered by a line of JSON on standard output. Whatever libraries print goes
to standard error.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from .case import Case, UnavailableError

#: Names of peers, each with a file of its own here: torch-compile is with_torch_compile.py.
PEERS = [path.stem.removeprefix("with_").replace("_", "-") for path in sorted(Path(__file__).parent.glob("with_*.py"))]
#: Seconds of timed calls a turn: a small network is called often, a large one once.
TURN = 0.2


class Peer:
    """The requests' answers.

    A peer's module has PACKAGES, of which the first is the peer itself; DEVICES, the CPU alone by default; where some
    files are written beforehand, `export(case, folder)`; and `prepare(case, folder)`, which returns a function without
    arguments that evaluates the network and returns an array. REFUSED has precisions that it does not have, and why.
    Packages that may not be installed are imported within these functions.
    """

    def __init__(self, name, case):
        self.case = case
        self.module = module_of(name)
        if case.device not in devices(name):
            raise UnavailableError(f"it is measured on {' and '.join(devices(name))}, not on {case.device}")
        versions = [_version(package) for package in self.module.PACKAGES]
        reason = getattr(self.module, "REFUSED", {}).get(case.dtype)
        if reason:
            raise UnavailableError(reason)
        self.version = versions[0]
        self.folder = case.folder / "-".join((name, *versions))

    def convert(self):
        """Once: write the files that the peer starts from, and start it, so that what it caches is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        if hasattr(self.module, "export"):
            seconds += self._once("exported", lambda: self.module.export(self.case, self.folder))
        started = f"started-{self.case.device}-{self.case.dtype}"
        seconds += self._once(started, lambda: self.module.prepare(self.case, self.folder)())
        return {"version": self.version, "conversion": seconds}

    def _once(self, name, work):
        """The seconds that some work took when it was done, now or in an earlier run."""
        done = self.folder / f"{name}.json"
        if not done.exists():
            start = time.perf_counter()
            work()
            done.write_text(json.dumps(time.perf_counter() - start))
        return json.loads(done.read_text())

    def start(self):
        """Load, prepare and evaluate once; the output lies in a file."""
        start = time.perf_counter()
        self.call = self.module.prepare(self.case, self.folder)
        output = self.call()
        seconds = time.perf_counter() - start
        np.save(self.folder / "output.npy", output)
        return {"start": seconds, "output": str(self.folder / "output.npy")}

    def turn(self):
        """Mean seconds of a call, after one that is not timed."""
        self.call()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() < start + TURN:
            self.call()
            calls += 1
        return {"seconds": (time.perf_counter() - start) / calls}

    def memory(self):
        """Peak memory in GB: resident, or what torch has taken of the GPU's."""
        if self.case.device == "cuda":
            import torch

            return {"memory": torch.cuda.max_memory_reserved() / 1e9}
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return {"memory": int(line.split()[1]) * 1024 / 1e9}


def module_of(peer):
    """The module of a peer by its name."""
    return importlib.import_module(f".with_{peer.replace('-', '_')}", __package__)


def devices(peer):
    """The devices on which a peer can be measured."""
    return getattr(module_of(peer), "DEVICES", ("cpu",))


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError(f"{package} is not installed: pip install {package}") from None


def main(name, case):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        peer = Peer(name, Case.from_json(case))
        for request in sys.stdin:
            print(json.dumps(getattr(peer, request.strip())()), file=answers)
    except UnavailableError as reason:
        print(json.dumps({"error": str(reason)}), file=answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])

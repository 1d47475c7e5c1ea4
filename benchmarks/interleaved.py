"""What the benchmarks of the CPU kernels share: their options, and calls that take turns."""

import argparse
import time

import torch
from cmfast.kernels import native


def options(description):
    """The options that all have; more can be added before they are read by `settle`."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--isa", default=native.cpu().build_info()["isa"])
    found.add_argument("--rounds", type=int, default=15)
    return found


def settle(arguments):
    """Read the options, and set threads, seed and instruction set accordingly."""
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    error = native.cpu().set_isa(given.isa)
    if error:
        arguments.error(error)
    return given


def print_table(given, rows, candidates, digits):
    """A row for each of (name, arguments of candidates), whose calls take turns: the least milliseconds of each."""
    for i, (name, sizes) in enumerate(rows):
        calls = candidates(*sizes)
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(given.rounds):
            for column, call in calls.items():
                start = time.perf_counter()
                call()
                least[column] = min(least[column], 1e3 * (time.perf_counter() - start))
        if not i:
            print(f"| {given.isa}, threads: {given.threads} | {' | '.join(calls)} |\n|---{'|---' * len(calls)}|")
        print(f"| {name} | {' | '.join(f'{ms:.{digits}f}' for ms in least.values())} |", flush=True)

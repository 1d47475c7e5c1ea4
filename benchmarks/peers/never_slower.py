"""Whether cmfast was ever slower than torch: python -m benchmarks.peers.never_slower benchmarks/results/PROCESSOR

Reads the JSON files `*-torch-*.json` of a processor's folder, which `cmfast bench model` writes:

    cmfast bench model --network imagenet64 --dtype bfloat16 --threads 2 --batch-sizes 1,8 \
        --peers cmfast,cmfast-eager,torch,torch-channels-last --json imagenet64-torch-bf16-2-threads.json

and prints a Markdown table. Torch's time is the least of its default memory format and channels-last, in the dtype that
was asked for and in float32, whichever somebody would have taken; cmfast's operators alone, whose convolutions
are torch's, are compared with torch in their own dtype. The exit status is 1 where a ratio is above 1.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmfast.benchmarking import comparison

TORCH = ("torch", "torch-channels-last")
OURS = ("cmfast", "cmfast-eager")
HEAD = ("network", "dtype", "batch", "threads", "cmfast, ms", "its operators alone", "torch", "ratio", "ratio alone")


@dataclasses.dataclass(frozen=True)
class Compared:
    """One evaluation of a network: seconds of ours, by variant, and those of torch that each is compared with.

    None of what was not measured.
    """

    network: str
    dtype: str
    batch: int
    threads: int
    ours: tuple[float | None, ...]
    torch: tuple[float, ...]

    @property
    def ratios(self) -> list[float | None]:
        """Ours over torch's."""
        pairs = zip(self.ours, self.torch, strict=True)
        return [None if seconds is None else seconds / other for seconds, other in pairs]


def read(files: Sequence[Path]) -> Iterator[Compared]:
    """What the files compare. Raises ValueError where one is no such file or has no row of torch."""
    seconds: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for path in files:
        document = comparison.read(path)
        settings, threads = document["settings"], document["environment"]["processor"]["threads"]
        for row in document["rows"]:
            if row.get("evaluation_s"):
                case = (settings["network"], settings["dtype"], row["batch"], threads)
                seconds.setdefault(case, {})[row["variant"]] = row["evaluation_s"]
    for case, found in sorted(seconds.items()):
        times = [found[name] for name in TORCH if name in found]
        if not times:
            raise ValueError(f"{', '.join(map(str, files))}: nothing of torch for {' '.join(map(str, case))} threads")
        exact = seconds.get((case[0], "float32", *case[2:]), {})
        best = min([*times, *(exact[name] for name in TORCH if name in exact)])
        yield Compared(*case, tuple(found.get(name) for name in OURS), (best, min(times)))


def table(rows: Sequence[Compared]) -> str:
    """Those rows in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for row in rows:
        ms = ["" if s is None else f"{1e3 * s:.3g}" if s < 1 else f"{1e3 * s:.0f}" for s in (*row.ours, row.torch[0])]
        ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in row.ratios]
        lines.append((row.network, row.dtype, str(row.batch), str(row.threads), *ms, *ratios))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    folder = arguments.parse_args().folder
    files = sorted(folder.glob("*-torch-*.json"))
    if not files:
        sys.exit(f"{folder} has no files *-torch-*.json")
    try:
        rows = list(read(files))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(table(rows))
    sys.exit(any(ratio is not None and ratio > 1 for row in rows for ratio in row.ratios))


if __name__ == "__main__":
    main()

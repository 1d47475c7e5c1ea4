"""Keep and draw what a run of gpu_check.py found: python benchmarks/gpu_results.py DIR

The stages' JSON (no traces, nothing over 1 MB) goes to benchmarks/results/gpu/<card>-<date>/. The table of docs/gpu.md
is written anew from it, and a picture of each operator's share of its ceiling and of the network's times is drawn in
docs/images. What the tuning measured goes to cmfast/engine/cuda/measured, from where the package takes it.
"""

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.supervisor import write_json  # noqa: E402

LARGEST = 1 << 20
BEGIN, END = "<!-- gpu: written by benchmarks/gpu_results.py -->", "<!-- /gpu -->"
COLORS = {"cuda": "tab:blue", "triton": "tab:green", "torch": "tab:gray", "torch.compile": "tab:orange"}


def main() -> int:
    """Copy, draw, and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what gpu_check.py wrote with --out")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--measured", type=Path, default=ROOT / "cmfast" / "engine" / "cuda" / "measured")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md", help="where the table goes")
    given = parser.parse_args()
    results = table.read(given.folder)
    if "machine" not in results or "operators" not in results:
        parser.error(f"{given.folder} has no machine.json and operators.json: expected the --out of a gpu_check.py run")
    if "emulation" in results:
        parser.error(f"{given.folder} holds a dry run, whose times say nothing of a GPU")
    page = given.page.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        parser.error(f"{given.page} must have the lines {BEGIN} and {END} once, for the table between them")
    card = next(row["card"] for row in results["machine"]["rows"] if "card" in row)
    date = datetime.date.fromtimestamp((given.folder / "machine.json").stat().st_mtime)
    kept = given.results / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}-{date}"
    keep(results, kept)
    for path in (given.folder / "measured").glob("forms-*.json"):
        write_json(given.measured / path.name, json.loads(path.read_text()))
    picture = given.page.parent / "images" / f"{kept.name}.png"
    draw(results, card, picture)
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    given.page.write_text(
        f"{before}{BEGIN}\n{summary(results, card, date, picture.relative_to(given.page.parent))}\n{END}{after}"
    )
    print(f"{kept}\n{picture}\n{given.page}")
    return 0


def keep(results: dict, folder: Path) -> None:
    """Write each stage's JSON that is small enough to be kept with the sources; ValueError for one that is not."""
    for stage, result in results.items():
        size = len(json.dumps(result, indent=1))
        if size > LARGEST:
            raise ValueError(f"{stage}.json has {size} bytes, and at most {LARGEST} are kept")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, result in results.items():
        write_json(folder / f"{stage}.json", result)


def summary(results: dict, card: str, date: datetime.date, picture: Path) -> str:
    """The page's part: the card, the network, the operators at batch 1, and how to repeat it."""
    commit = next((row["commit"] for row in results["machine"]["rows"] if row.get("commit")), "unknown commit")
    method = "`python3 benchmarks/gpu_check.py`; medians of CUDA graph replays, L2 cache cold"
    lines = [f"{card}, {date}, commit {commit} ({method}):", ""]
    headings = ("one evaluation, ImageNet 64×64", "batch", "dtype", "called, ms", "in a graph, ms", "launches")
    lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in table.rows(results, "network", "called_us"):
        graph = f"{row['replayed_us'] / 1e3:.2f}" if "replayed_us" in row else "–"
        cells = (row["variant"], row["batch"], row["dtype"], f"{row['called_us'] / 1e3:.2f}", graph)
        launches = f"{row.get('launches', '–')}" + (f" ({row['steps']} steps)" if "steps" in row else "")
        lines.append(f"| {' | '.join(map(str, cells))} | {launches} |")
    lines += ["", f"| operator, µs (share of the ceiling) | {' | '.join(COLORS)} |", "|---" * (1 + len(COLORS)) + "|"]
    for call, by in list(table.operators(results).items())[: table.OPERATORS]:
        cells = [f"{by[n]['cold_us']:.4g} ({by[n].get('share', 0):.0%})" if n in by else "–" for n in COLORS]
        lines.append(f"| {call} | {' | '.join(cells)} |")
    wrong = table.problems(results)
    lines += ["", f"{len(wrong)} checks failed." if wrong else "Every check passed."]
    lines += ["", f"![Operators as shares of their ceilings, and the network's milliseconds]({picture})"]
    return "\n".join(lines)


def draw(results: dict, card: str, path: Path) -> None:
    """Bars: the operators' shares of their ceilings on the left, the network's milliseconds in a graph on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = list(table.operators(results).items())[:24]
    network = [row for row in table.rows(results, "network", "replayed_us") if row["batch"] == 1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, 1.5 + 0.45 * max(len(calls), len(network), 4)))
    for j, (name, color) in enumerate(COLORS.items()):
        shares = {i + 0.2 * j: by[name].get("share", 0) for i, (_, by) in enumerate(calls) if name in by}
        if shares:
            left.barh(list(shares), list(shares.values()), 0.2, color=color, label=name)
    left.set_yticks([i + 0.3 for i in range(len(calls))], [call for call, _ in calls], fontsize=7)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("share of the measured ceiling (memory, or matrix products)")
    if calls:
        left.legend()
    names = [f"{row['variant']}, {row['dtype']}" for row in network]
    right.barh(names, [row["replayed_us"] / 1e3 for row in network], color="tab:blue")
    right.invert_yaxis()
    right.set_xlabel("ms an evaluation, ImageNet 64×64, batch 1, in a CUDA graph")
    figure.suptitle(card)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

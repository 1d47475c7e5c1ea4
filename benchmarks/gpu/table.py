"""What a run of the check found, in at most 60 lines: from the stages' results, with the standard library only."""

import json
from pathlib import Path

STAGES = (
    "install",
    "emulation",
    "machine",
    "compile",
    "correctness",
    "operators",
    "network",
    "sampling",
    "conformance",
    "tuning",
)
LINES = 60
#: Lines for what was wrong, and for the operators.
PROBLEMS, OPERATORS = 14, 16


def read(folder: Path) -> dict[str, dict]:
    """The results that lie in a folder, by stage."""
    paths = {stage: folder / f"{stage}.json" for stage in STAGES}
    return {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.exists()}


def problems(results: dict[str, dict]) -> list[str]:
    """What was wrong, over all stages."""
    return [f"{stage}: {problem}" for stage, result in results.items() for problem in result["problems"]]


def lines(results: dict[str, dict]) -> list[str]:
    """The table, line by line."""
    found = [*_stages(results), *_machine(results), *_operators(results)]
    found += [*_network(results), *_sampling(results), *_tuning(results)]
    wrong = problems(results)
    tail = [f"wrong ({len(wrong)}):"] if wrong else ["nothing was wrong"]
    tail += [f"  {_short(problem)}" for problem in wrong[:PROBLEMS]]
    if len(wrong) > PROBLEMS:
        tail[-1] = f"  … and {len(wrong) - PROBLEMS + 1} more, in the stages' JSON"
    return [*found[: LINES - len(tail)], *tail]


def _short(text: str, width: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def rows(results: dict[str, dict], stage: str, field: str) -> list[dict]:
    """The rows of a stage that have a figure."""
    return [row for row in results.get(stage, {}).get("rows", []) if field in row]


def _stages(results) -> list[str]:
    parts = [
        f"{stage} {result['state']}, {result['seconds']:.0f} s, {len(result['rows'])} rows"
        + (f", {len(result['left'])} cases left" if result["left"] else "")
        for stage, result in results.items()
    ]
    return [_short("; ".join(parts[i : i + 4])) for i in range(0, len(parts), 4)]


def _machine(results) -> list[str]:
    found = {row["ceiling"]: row for row in rows(results, "machine", "ceiling")}
    card = next((row["card"] for row in rows(results, "machine", "card")), "unknown card")
    parts = [f"{k} {r['bytes_per_s'] / 1e12:.3g} TB/s" for k, r in found.items() if "bytes_per_s" in r]
    parts += [f"{k} {r['flops_per_s'] / 1e12:.3g} TFLOP/s" for k, r in found.items() if "flops_per_s" in r]
    if "launch" in found:
        launch = found["launch"]
        parts.append(f"launch {launch['from_python_us']:.3g} µs, in a graph {launch['in_a_graph_us']:.3g}")
    card += " (a dry run: its times say nothing)" if "emulation" in results else ""
    return [_short(f"{card}: {', '.join(parts)}", 200)]


def operators(results) -> dict[str, dict[str, dict]]:
    """The timed rows of each call, by backend."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows(results, "operators", "cold_us"):
        found.setdefault(f"{row['op']} {row['shape']} {row['form']} {row['dtype']}", {})[row["backend"]] = row
    return found


def _operators(results) -> list[str]:
    found = operators(results)
    if not found:
        return []
    names = ("cuda", "triton", "torch", "torch.compile")
    lines = [f"{'cold µs (share of the ceiling)':76}" + "".join(f"{name:>15}" for name in names)]
    for call, by in list(found.items())[:OPERATORS]:
        cells = [f"{_figure(by[n]['cold_us'])} {by[n].get('share', 0):4.0%}" if n in by else "–" for n in names]
        lines.append(f"{_short(call, 75):76}" + "".join(f"{cell:>15}" for cell in cells))
    if len(found) > OPERATORS:
        lines.append(f"  … and {len(found) - OPERATORS} more calls, in operators.json")
    return lines


def _figure(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _network(results) -> list[str]:
    found = rows(results, "network", "called_us")
    if not found:
        return []
    lines = [f"{'the network, ms':44}{'called':>10}{'in a graph':>12}{'launches':>10}{'steps':>7}{'peak GB':>9}"]
    for row in found[:16]:
        name = f"{row['variant']}, {row['dtype']}, batch {row['batch']}"
        graph = f"{row['replayed_us'] / 1e3:12.3f}" if "replayed_us" in row else f"{'–':>12}"
        steps = row.get("steps", "–")
        rest = f"{row.get('launches', 0):10d}{steps:>7}{row.get('peak_bytes', 0) / 1e9:9.2f}"
        lines.append(f"{name:44}{row['called_us'] / 1e3:10.3f}{graph}{rest}")
    return lines


def _sampling(results) -> list[str]:
    return [
        f"{row['model']} {row['sampler']}, batch {row['batch']}: {row['seconds'] * 1e3:.1f} ms, "
        f"{row['samples_per_s']:.1f} samples/s"
        + (f", {row['faster_than_heun']:.1f} times as fast as Heun" if "faster_than_heun" in row else "")
        for row in rows(results, "sampling", "seconds")
    ]


def _tuning(results) -> list[str]:
    tuned = [row for row in rows(results, "tuning", "chosen_us") if "rule_us" in row]
    if not tuned:
        return []
    faster = sum(row["chosen_us"] < 0.95 * row["rule_us"] for row in tuned)
    by_torch = sum(row["chosen"] == "torch" for row in tuned)
    most = min(tuned, key=lambda row: row["chosen_us"] / row["rule_us"])
    return [
        f"tuning: for {faster} of {len(tuned)} calls others are over 5 % faster than the rule's form, for "
        f"{by_torch} torch's is the fastest; the most is {most['chosen_us'] / most['rule_us']:.2f} of its time, "
        + _short(most["call"], 80)
    ]

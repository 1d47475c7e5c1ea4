"""`cmfast env`: what this machine is, and which backend serves which operator."""

import json

from rich.console import Console
from rich.table import Table

from ..environment import describe
from .options import Json


def env(as_json: Json = False) -> None:
    """Print versions, processor, GPUs, and which backend serves which operator and why not."""
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print("  ".join(f"{name} {version}" for name, version in facts["versions"].items()), highlight=False)
    if facts["commit"]:
        console.print(f"commit {facts['commit']}", highlight=False)
    cpu = facts["processor"]
    console.print(f"{facts['system']}", highlight=False)
    console.print(
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}", highlight=False
    )
    console.print(f"GPU: {'; '.join(facts['gpus']) or 'none'}", highlight=False)
    built = facts["extensions"]["cpu"]
    console.print(
        f"CPU kernels: {built['isa']} (of {built['isas']}), built with {built['compiler']}"
        if built
        else "CPU kernels: not built",
        highlight=False,
    )
    built = facts["extensions"]["cuda"]
    console.print(
        f"CUDA kernels: {built['architectures']}, built with {built['compiler']}"
        if built
        else "CUDA kernels: not built",
        highlight=False,
    )
    table = Table("operator", *facts["backends"])
    reasons: dict[str, None] = {}
    for op in next(iter(facts["backends"].values())):
        cells = []
        for name, answers in facts["backends"].items():
            cells.append("yes" if answers[op] == "yes" else "no")
            if answers[op] != "yes":
                reasons[f"{name}: {answers[op]}"] = None
        table.add_row(op, *cells)
    console.print(table)
    for reason in reasons:
        console.print(reason, highlight=False, markup=False)

"""Results in files: CSV and JSON with the machine, the versions and the commit."""

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..environment import describe
from ..files import whole_file


def write_json(
    path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], total: Mapping[str, Any] | None = None
) -> None:
    """Write {"environment", "date", "settings", "rows"}, and the entries of `total` before them; a row is a line."""
    document = {**(total or {}), "environment": describe(), "date": _now(), "settings": dict(settings)}
    head = json.dumps(document, indent=2).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(dict(row))}" for row in rows)
    with whole_file(path) as file:
        file.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> None:
    """Write a line a row; the last columns name the machine, the versions, the commit and, where given, the settings.

    The columns are those of all rows: what a row does not have is empty.
    """
    facts = describe()
    machine = {
        "processor": facts["processor"]["name"],
        "isa": (facts["extensions"]["cpu"] or {}).get("isa", ""),
        "clocks": "; ".join(f"{name} {value}" for name, value in facts["clocks"].items()),
        "threads": facts["processor"]["threads"],
        "gpu": "; ".join(facts["gpus"]),
        "torch": facts["versions"]["torch"],
        "cmfast": facts["versions"]["cmfast"],
        "commit": facts["commit"] or "",
        "date": _now(),
    }
    if settings is not None:
        machine["settings"] = json.dumps(settings)
    columns = dict.fromkeys(column for row in rows for column in row)
    with whole_file(path) as file, file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*columns, *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

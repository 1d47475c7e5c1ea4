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
    """Write {"environment", "date", "settings", "rows"}, and the entries of `total` before them."""
    document = {**(total or {}), "environment": describe(), "date": _now(), "settings": dict(settings)}
    document["rows"] = [dict(r) for r in rows]
    with whole_file(path) as file:
        file.write_text(json.dumps(document, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line a row; the last columns name the machine, the versions and the commit."""
    facts = describe()
    machine = {
        "processor": facts["processor"]["name"],
        "threads": facts["processor"]["threads"],
        "gpu": "; ".join(facts["gpus"]),
        "torch": facts["versions"]["torch"],
        "cmfast": facts["versions"]["cmfast"],
        "commit": facts["commit"] or "",
        "date": _now(),
    }
    with whole_file(path) as file, file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

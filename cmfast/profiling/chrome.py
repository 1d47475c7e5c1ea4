"""A recorded call as Chrome's trace events ("Trace Event Format", Google), which Perfetto reads too."""

from collections.abc import Sequence
from typing import Any

from ..engine.layers import Nesting
from .ceilings import name_of
from .recording import Operation


def events(network: str, timeline: Sequence[Operation]) -> list[dict[str, Any]]:
    """Complete events: the network, its modules by their dotted names, nested, and in these the operators.

    A module that does several things, with others between them, has a range for each.
    """
    found: list[dict[str, Any]] = [_named("process_name", "cmfast"), _named("thread_name", network)]
    open_: list[dict[str, Any]] = []
    last = 0.0

    def begin(name: str) -> None:
        event = _event(name, "module", operation.begin)
        found.append(event)
        open_.append(event)

    def end() -> None:
        event = open_.pop()
        event["dur"] = 1e6 * last - event["ts"]

    modules, stages = Nesting(begin, end), Nesting(begin, end)
    stage = ""
    for operation in timeline:
        if not open_:
            begin(network)
        if operation.stage != stage:
            modules.enter("")
            stages.enter(operation.stage)
            stage = operation.stage
        modules.enter(operation.layer)
        event = _event(operation.operator, "operator", operation.begin)
        event["dur"] = 1e6 * operation.seconds
        event["args"] = {
            "layer": operation.layer,
            "step": operation.kind,
            "operations": operation.operations,
            "bytes": operation.bytes,
        }
        if operation.products is not None:
            event["args"]["products"] = name_of(operation.products)
        if operation.reason:
            event["args"]["reason"] = operation.reason
        found.append(event)
        last = max(last, operation.begin + operation.seconds)
    modules.enter("")
    stages.enter("")
    while open_:
        end()
    return found


def _event(name: str, category: str, begin: float) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "ts": 1e6 * begin, "dur": 0.0, "pid": 1, "tid": 1}


def _named(what: str, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": 1, "args": {"name": name}}

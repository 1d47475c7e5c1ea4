"""Stage c: each operator's time at the networks' shapes: cuda, triton, torch, and what torch.compile makes of torch's.

Times are of CUDA graph replays: over buffers that together exceed the L2 cache twice (cold), and over one (warm). A row
of the wrong result has none. The share of the ceiling is that of the cold time: bytes by the measured copy, or the
operations of an attention or a convolution by the measured matrix product, whichever takes longer.
"""

import json

from cmfast.benchmarking import accuracy, plain_torch, serving
from cmfast.benchmarking.calls import bytes_moved, fields, name

from . import calls, stage

#: Calls of a graph, at least and at most.
CALLS, MOST = 20, 256


def cases(device, folder, until):
    """Each call on each backend and in torch; then torch.compile, which takes longest."""
    ceilings = _ceilings(folder)
    timed = calls.sizes(device).timed
    for call in timed:
        for backend in (*calls.backends_of(call), "torch"):
            work = lambda call=call, backend=backend: [measure(call, backend, device, ceilings)]  # noqa: E731
            yield stage.Case(f"{name(call)} on {backend}", work)
    for call in timed[-1:] if device.emulated else timed:
        work = lambda call=call: [measure(call, "torch.compile", device, ceilings)]  # noqa: E731
        yield stage.Case(f"{name(call)} on torch.compile", work, patience=90, optional=True)


def _ceilings(folder) -> dict[str, dict]:
    path = folder / "machine.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["ceiling"]: row for row in rows if "ceiling" in row}


def measure(call, backend: str, device, ceilings) -> dict:
    """A row: cold and warm microseconds with their quartiles, and what share of the ceiling the cold time is."""
    row = {**fields(call), "backend": backend}
    if device.refusal(backend):
        return {**row, "error": f"backend {backend!r} is not here: {device.refusal(backend)}"}
    given = calls.values(call, device)
    try:
        bind = _binder(call, backend, given)
        run = bind(given)
        row["largest_error"] = _judge(call, backend, given, run())
    except (AssertionError, RuntimeError) as error:
        return {**row, "error": str(error)}
    moved = bytes_moved(call, given)
    count = min(MOST, max(CALLS, -(-2 * device.cache_bytes // moved) + 1), max(2, (8 << 30) // moved))
    sets = [
        run,
        *(bind(calls.values(call, device, i)) for i in range(1, 2 if device.emulated else count)),
    ]
    cold = device.replayed(sets)
    del sets
    warm = device.replayed([run] * min(CALLS, count))
    device.free()
    row |= {"cold_us": cold.median, "cold_low_us": cold.low, "cold_high_us": cold.high}
    row |= {"warm_us": warm.median, "warm_low_us": warm.low, "warm_high_us": warm.high}
    row |= {"bytes": moved, "flops": sum(call.flops), "buffers": count}
    floor = _floor_us(call, moved, ceilings)
    return {**row, "floor_us": round(floor, 3), "share": round(floor / cold.median, 4)} if floor else row


def _binder(call, backend: str, given):
    """A function of values that gives the call of them; torch.compile compiles once for all."""
    if backend in calls.BACKENDS:
        return lambda values: serving.launched(call, backend, values)
    compiled = plain_torch.compile_call(call, given) if backend == "torch.compile" else None
    return lambda values: plain_torch.in_torch(call, values, compiled)


def _judge(call, backend: str, given, actual) -> float:
    judge = accuracy.judge if backend in calls.BACKENDS else accuracy.judge_plain
    return judge(call, given, actual)


def _floor_us(call, moved: int, ceilings) -> float:
    if "copy" not in ceilings:
        return 0.0
    seconds = moved / ceilings["copy"]["bytes_per_s"]
    if call.op.startswith(("attention", "conv2d")) and f"product {call.dtype}" in ceilings:
        seconds = max(seconds, sum(call.flops) / ceilings[f"product {call.dtype}"]["flops_per_s"])
    return 1e6 * seconds


if __name__ == "__main__":
    stage.main("operators", cases)

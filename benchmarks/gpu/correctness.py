"""Stage b: every operator × backend × dtype, forward and backward, against float64, and twice: bit-identical.

Operators that the backend "cuda" has no kernel for are checked on "triton" alone.

Fresh memory is NaN, so that what a kernel leaves unwritten shows.
"""

import torch

from cmfast.benchmarking import accuracy, serving
from cmfast.benchmarking.calls import fields, name, tensors

from . import calls, stage


def cases(device, folder, until):
    """Each call on each backend."""
    seen = set()
    for call in calls.checked(device):
        if name(call) in seen:
            continue
        seen.add(name(call))
        for backend in calls.backends_of(call):
            yield stage.Case(
                f"{name(call)} on {backend}", lambda call=call, backend=backend: [check(call, backend, device)]
            )


def check(call, backend: str, device) -> dict:
    """A row: the error as a share of the largest value, or what is wrong."""
    row = {**fields(call), "backend": backend}
    reason = device.refusal(backend)
    if reason:
        return {**row, "error": f"backend {backend!r} is not here: {reason}"}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        given = calls.values(call, device)
        run = serving.served(call, backend, given)
        first, second = tensors(run()), tensors(run())
        row["largest_error"] = accuracy.judge(call, given, first)
    except (AssertionError, RuntimeError) as error:
        return {**row, "error": str(error)}
    finally:
        torch.use_deterministic_algorithms(False)
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return {**row, "error": "two runs differ"}
    return row


if __name__ == "__main__":
    stage.main("correctness", cases)

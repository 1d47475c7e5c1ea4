"""What the device can do at most, measured by plain torch in the same run: copies, reads, products."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .devices import Device, Position
from .rounds import Candidate, Row

#: Bytes of a copy, at least, and rows of a product.
BYTES, PRODUCT = {"cpu": 1 << 28, "cuda": 1 << 30}, {"cpu": 1024, "cuda": 8192}


def ceilings(device: Device, dtypes: Sequence[str], rows: dict[str, Row]) -> Iterator[Candidate]:
    """Each ceiling, ready for its turns; `rows` keeps their rows by name.

    "copy" and "read" are of the memory, "cached copy" is of a buffer of an eighth of the last cache to another,
    "launch" is an addition to one number, and "product" there is for each dtype.
    """
    size, small = max(4 * device.cache_bytes, BYTES[device.name]), device.cache_bytes // 8
    yield _candidate(device, "copy", "", copy(device.name, size), {"bytes": 2 * size}, rows)
    yield _candidate(device, "read", "", read(device.name, size), {"bytes": size}, rows)
    yield _candidate(device, "cached copy", "", copy(device.name, small), {"bytes": 2 * small}, rows)
    yield _candidate(device, "launch", "", launch(device.name), {"calls": 1}, rows)
    for dtype in dtypes:
        n = PRODUCT[device.name]
        yield _candidate(device, "product", dtype, product(device.name, dtype, n), {"flops": 2 * n**3}, rows)


def _candidate(
    device: Device, name: str, dtype: str, work: Callable[[], Any], facts: dict[str, int], rows: dict[str, Row]
) -> Candidate:
    key = {"op": "ceiling", "shape": name, "layout": "", "form": "", "dtype": dtype, "backend": "torch"}
    row = rows.setdefault(f"{name} {dtype}".strip(), Row(key, dict(facts), control=True))
    return Candidate(row, {"cold": device.timer([work] * (20 if name == "launch" else 1), Position())})


def copy(device: str, size: int) -> Callable[[], Any]:
    """A copy of so many bytes within the memory: as many are read, and written."""
    x = torch.randn(size // 4, device=device)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def read(device: str, size: int) -> Callable[[], Any]:
    """A sum, which reads so many bytes."""
    x = torch.randn(size // 4, device=device)
    return lambda: x.sum()


def launch(device: str) -> Callable[[], Any]:
    """An addition to one number: what a call costs at least."""
    one = torch.zeros(1, device=device)
    return lambda: one.add_(1)


def product(device: str, dtype: str, n: int) -> Callable[[], Any]:
    """A product of random matrices [n, n]; on a GPU float32 as tf32, of which ours take three each."""
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))

    def multiply() -> torch.Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return multiply


def floor_seconds(op: str, dtype: str, moved: int, flops: int, rows: dict[str, Row]) -> float | None:
    """The least seconds of a call by the ceilings: its bytes by the copy, its products by the product of its dtype.

    Of operators that are no products, operations count for nothing. None where the ceiling was not measured.
    """

    def seconds(name: str, fact: str, amount: int) -> float | None:
        times = rows[name].times("cold") if name in rows else None
        return None if times is None else amount * times.median / rows[name].facts[fact]

    floors = [seconds("copy", "bytes", moved)]
    if op.startswith(("attention", "conv2d")):
        floors.append(seconds(f"product {dtype}", "flops", flops))
    return None if None in floors else max(f for f in floors if f is not None)

"""What the machine reaches at most, measured: copies of memory, and products of matrices of each dtype."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import torch

from ..engine.trace import synchronize
from ..kernels import conv2d, prepare_conv
from ..kernels.conv_forms import CONV_FORMS
from ..kernels.cpu import available

#: Bytes of the memory in which copies are measured, at least and at most.
_SMALLEST, _LARGEST = 1 << 20, 1 << 29
#: Rows and columns of the matrices that are multiplied, at most, by the type of the device; and at least.
_MATRIX, _SMALL = {"cpu": 1024, "cuda": 8192}, 128
#: A measurement is the best of so many, and of more until they have taken so many seconds.
_TRIES, _SECONDS = 8, 0.2
#: Matrices grow until a product takes so many seconds.
_LONG = 0.01
#: Channels, and height and width, of the convolution that multiplies matrices by cmfast's own kernels.
_CHANNELS, _SIDE = 512, 32


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The rates from which least times follow.

    Attributes:
        bandwidth: bytes a second, read and written, of a copy within memory of `copied` bytes.
        copied: as large as the memory of the evaluation: what fits in caches is copied there, too.
        products: multiplications and additions a second of products of matrices, by the dtype's name: the best of
            torch.mm and, on a CPU, cmfast's own convolution of 1 x 1.
    """

    bandwidth: float
    copied: int
    products: dict[str, float]

    def floor(self, operations: int, moved: int, products: torch.dtype | None) -> float:
        """The least seconds for these operations and bytes: of both, what takes longer."""
        rate = self.products.get(name_of(products)) if operations else None
        return max(moved / self.bandwidth, operations / rate if rate else 0.0)


def measure_ceilings(device: torch.device, dtypes: Iterable[torch.dtype], copied: int) -> Ceilings:
    """Measure a device's ceilings for products of these dtypes and memory of so many bytes.

    Narrow products are taken to be no slower than those of float32, which can stand for them; dtypes that torch has no
    products of are left out.
    """
    copied = min(max(copied, _SMALLEST), _LARGEST)
    source = torch.ones(copied // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    rates = {dtype: _product(dtype, device) for dtype in sorted({torch.float32, *dtypes}, key=str)}
    least = rates[torch.float32] or 0.0
    narrow = (torch.bfloat16, torch.float16)
    products = {name_of(d): max(rate, least) if d in narrow else rate for d, rate in rates.items() if rate}
    return Ceilings(bandwidth, 2 * source.nbytes, products)


def name_of(dtype: torch.dtype | None) -> str:
    """A dtype's name, such as float32."""
    return str(dtype).removeprefix("torch.")


def _product(dtype: torch.dtype, device: torch.device) -> float | None:
    """Operations a second; None where there are no products of this dtype."""
    rates = [_by_kernels(dtype)] if device.type == "cpu" else []
    with contextlib.suppress(RuntimeError, TypeError):
        rates.append(_by_torch(dtype, device))
    return max(rates, default=0.0) or None


def _by_torch(dtype: torch.dtype, device: torch.device) -> float:
    size = _SMALL
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        product = functools.partial(torch.mm, a, a)
        product()  # a library may prepare something
        begin = time.perf_counter()
        product()
        synchronize(device)
        if time.perf_counter() - begin > _LONG or size >= _MATRIX[device.type]:
            return 2 * size**3 / _best(product, device)
        size *= 2


def _by_kernels(dtype: torch.dtype) -> float:
    weight = torch.ones(_CHANNELS, _CHANNELS, 1, 1)
    x = torch.ones(1, _CHANNELS, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
    if dtype not in CONV_FORMS or not available("conv2d", [x, weight])[0]:
        return 0.0
    prepared = prepare_conv(weight, dtype=dtype, height=_SIDE, width=_SIDE)
    return 2 * weight.numel() * _SIDE**2 / _best(lambda: conv2d(x, prepared), torch.device("cpu"))


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    call()
    seconds: list[float] = []
    while len(seconds) < _TRIES or sum(seconds) < _SECONDS:
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

"""Measure on the GPU at hand which form of each convolution is fastest, and remember it in a file of the card's."""

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.conv_arguments import ConvArguments
from .convolutions import alone, flops, lower_conv2d
from .executable import Executable
from .forms import Form, candidates
from .measurements import Measurements, describe, file_name, read, versions
from .rule import Rule
from .timing import seconds
from .weights import pack

_log = logging.getLogger(__name__)

#: Copies of a call's memory that are used in turn, at most. Together they are larger than the cache, as far as that
#: goes: a network's weights come from memory too.
_MOST_COPIES = 24
#: Relative to the norm of what the first form gives, by the dtype of products: as far as a form may be off.
_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Elements of what is copied to measure the memory's rate.
_MANY_ELEMENTS = 1 << 26
#: What was measured in this process, by the card and versions: a network that changes is not measured again.
_measured: dict[tuple, Measurements] = {}


class Tuner:
    """Chooses forms by measurement; what was measured before, on such a card with these versions, it knows.

    A form whose result is not that of the first form, or that does not run, is left out; the log says which.
    """

    def __init__(self, device: torch.device, arch: str, cache: Path | None) -> None:
        """Read what is known from the folder `cache`, if there is one. What it cannot use is reported, and replaced."""
        self._device, self._arch = device, arch
        here = versions(device)
        self._path = None if cache is None else cache / file_name(here["card"])
        self._known = _measured.setdefault(tuple(here.items()), Measurements(here))
        self._kept: set[str] = set()  # calls that are in the file
        if self._path is not None and self._path.exists():
            try:
                found = read(self._path)
            except ValueError as error:
                _log.warning("%s: what is needed of it is measured again", error)
            else:
                self._take(found)

    def _take(self, found: Measurements) -> None:
        if found.versions != self._known.versions:
            differ = [k for k, v in self._known.versions.items() if found.versions.get(k) != v]
            _log.info("%s was measured with another %s: it is measured again", self._path, " and ".join(differ))
            return
        self._kept = set(found.calls)
        self._known.calls = found.calls | self._known.calls
        self._known.launch_seconds = self._known.launch_seconds or found.launch_seconds
        self._known.bytes_per_second = self._known.bytes_per_second or found.bytes_per_second

    def __call__(self, a: ConvArguments, backends: Collection[str]) -> Form:
        """The fastest form of a call, of those of the backends."""
        forms = {str(form): form for form in candidates(a, backends, self._arch)}
        first = next(iter(forms.values()))
        if len(forms) == 1:
            return first
        call = describe(a)
        times = self._known.seconds(call)
        if forms.keys() - times.keys():
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                _log.warning("nothing can be measured while a CUDA graph is captured: a form is taken by the rule")
                return Rule(self._arch, self._known)(a, backends)
            self._measure_rates()
            missing = [form for name, form in forms.items() if name not in times]
            times = times | self._measure(a, first, missing)
            dtype = str(a.dtype).removeprefix("torch.")
            self._known.calls[call] = {"flops": flops(a), "dtype": dtype, "seconds": times}
            self._kept.discard(call)
        if self._path is not None and call not in self._kept:
            self._known.write(self._path)
            self._kept = set(self._known.calls)
        served = {name: s for name in forms if (s := times.get(name)) is not None}
        return forms[min(served, key=served.__getitem__)] if served else first

    def times(self, a: ConvArguments) -> dict[str, float | None]:
        """The seconds of the forms of a call, as far as they are known, by their names; the first form's first."""
        return self._known.seconds(describe(a))

    def _measure_rates(self) -> None:
        """What a launch takes, and the bytes of memory a second."""
        if self._known.launch_seconds and self._known.bytes_per_second:
            return
        on_gpu = self._device.type == "cuda"
        few, many = (torch.ones(n, device=self._device) for n in (1, _MANY_ELEMENTS if on_gpu else 1 << 16))
        to = torch.empty_like(many)
        self._known.launch_seconds = seconds([lambda: few.mul_(1)], self._device)
        self._known.bytes_per_second = 2 * many.nbytes / seconds([lambda: to.copy_(many)], self._device)

    def _measure(self, a: ConvArguments, first: Form, forms: Sequence[Form]) -> dict[str, float | None]:
        """Seconds of each form by its name; None of those that are left out, and none where memory did not suffice."""
        generator = torch.Generator(self._device).manual_seed(0)
        weight = self._normal(a.weight.shape, torch.float32, generator) / math.sqrt(math.prod(a.weight.shape[1:]))
        inputs = [self._normal(t.shape, t.dtype, generator) for t in alone(a)[0].inputs]
        expected = self._executable(a, first, weight)(inputs)
        found: dict[str, float | None] = {}
        for form in forms:
            try:
                found[str(form)] = self._time(a, form, weight, inputs, expected)
            except Exception as error:
                _log.info("%s is left out for a convolution of %s: %s", form, describe(a), error)
                if not isinstance(error, torch.OutOfMemoryError):
                    found[str(form)] = None
        return found

    def _time(
        self, a: ConvArguments, form: Form, weight: Tensor, inputs: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> float | None:
        copies = [self._executable(a, form, weight)]
        off = _differences(copies[0](inputs), expected, a)
        if not all(x <= _TOLERANCE[a.dtype] for x in off):
            _log.warning("%s is left out for a convolution of %s: it is off by %s", form, describe(a), _figures(off))
            return None
        for _ in range(1, self._copies(copies[0].bytes + weight.numel() * a.dtype.itemsize)):
            copies.append(self._executable(a, form, weight))
            copies[-1](inputs)
        return seconds([copy.launch for copy in copies], self._device)

    def _copies(self, size: int) -> int:
        """How many copies of so many bytes are larger than the cache."""
        if self._device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        return max(1, min(_MOST_COPIES, -(-2 * cache // size)))

    def _executable(self, a: ConvArguments, form: Form, weight: Tensor) -> Executable:
        """A call alone, in memory of its own; its inputs stay as they are, so that it can be launched again."""
        steps, given = alone(a)
        packed = pack(weight, a.dtype, form.backend).clone()
        out, moments = lower_conv2d(form, steps, "conv2d", given, packed, self._arch)
        outputs = [out] + ([moments] if a.moments else [])
        steps.want([*outputs, *steps.inputs])
        dtypes = [t.dtype for t in (*outputs, *steps.inputs)]
        return Executable(steps, {}, dtypes, self._device, graphs=False)

    def _normal(self, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self._device).to(dtype)


def _figures(numbers: Sequence[float]) -> str:
    return ", ".join(f"{x:.2g}" for x in numbers)


def _differences(found: Sequence[Tensor], expected: Sequence[Tensor], a: ConvArguments) -> list[float]:
    """How far outputs are from others, relative to their norm; and so the channels' means and standard deviations."""
    outs = found[0].double(), expected[0].double()
    off = [((outs[0] - outs[1]).norm() / outs[1].norm()).item()]
    if a.moments:
        positions = math.prod(a.output_shape()[2:])
        means, deviations = ([t[:, i].double() for t in (found[1], expected[1])] for i in range(2))
        deviations = [(t / positions).sqrt() for t in deviations]
        size = (means[1].square() + deviations[1].square()).sqrt().norm()
        off += [((x - exact).norm() / size).item() for x, exact in (means, deviations)]
    return off

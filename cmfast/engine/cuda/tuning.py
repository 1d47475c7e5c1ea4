"""Measure on the GPU at hand which form of each call is fastest, and remember it in a file of the card's."""

import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.conv_arguments import ConvArguments
from ..steps import Steps
from .convolutions import alone, flops, lower_conv2d
from .executable import Executable
from .forms import Form, candidates
from .measurements import Measurements, describe, describe_operator, file_name, read, versions
from .operators import lower_operator
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
        self._generator = torch.Generator(device).manual_seed(0)
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
        """The fastest form of a convolution, of those of the backends."""

        def make() -> _Make:
            weight = self._normal(a.weight.shape, torch.float32) / math.sqrt(math.prod(a.weight.shape[1:]))
            return functools.partial(self._convolution, a, weight)

        compare = functools.partial(_differences, a=a)
        forms = candidates(a, backends, self._arch)
        return self._fastest(describe(a), forms, a.dtype, flops(a), make, compare)

    def of_operator(self, op: str, arguments: Sequence[Any], backends: Collection[str]) -> Form:
        """The fastest form of another operator's call."""
        dtype = next(x.dtype for x in arguments if isinstance(x, Tensor))
        make = functools.partial(functools.partial, self._operator, op, arguments)
        forms = [Form(backend) for backend in backends]
        return self._fastest(describe_operator(op, arguments), forms, dtype, 0, make, _relative)

    def _fastest(
        self,
        call: str,
        forms: Sequence[Form],
        dtype: torch.dtype,
        operations: int,
        make: Callable[[], "_Make"],
        compare: Callable[[Sequence[Tensor], Sequence[Tensor]], list[float]],
    ) -> Form:
        """The fastest of the forms, of which those are measured that are not known.

        `make` gives what makes of a form an executable of the call alone, and the results among its outputs.
        """
        if len(forms) == 1:
            return forms[0]
        times = self._known.seconds(call)
        missing = [form for form in forms if str(form) not in times]
        if missing:
            self._measure_rates()
            times = times | self._measure(call, make(), forms[0], missing, _TOLERANCE[dtype], compare)
            name = str(dtype).removeprefix("torch.")
            self._known.calls[call] = {"flops": operations, "dtype": name, "seconds": times}
            self._kept.discard(call)
        if self._path is not None and call not in self._kept:
            self._known.write(self._path)
            self._kept = set(self._known.calls)
        served = {form: s for form in forms if (s := times.get(str(form))) is not None}
        return min(served, key=served.__getitem__) if served else forms[0]

    def times(self, call: str) -> dict[str, float | None]:
        """The seconds of the forms of a call, as far as they are known, by their names; the first form's first."""
        return self._known.seconds(call)

    def _measure_rates(self) -> None:
        """What a launch takes, and the bytes of memory a second."""
        if self._known.launch_seconds and self._known.bytes_per_second:
            return
        on_gpu = self._device.type == "cuda"
        few, many = (torch.ones(n, device=self._device) for n in (1, _MANY_ELEMENTS if on_gpu else 1 << 16))
        to = torch.empty_like(many)
        self._known.launch_seconds = seconds([lambda: few.mul_(1)], self._device)
        self._known.bytes_per_second = 2 * many.nbytes / seconds([lambda: to.copy_(many)], self._device)

    def _measure(
        self,
        call: str,
        make: "_Make",
        first: Form,
        forms: Sequence[Form],
        tolerance: float,
        compare: Callable[[Sequence[Tensor], Sequence[Tensor]], list[float]],
    ) -> dict[str, float | None]:
        """Seconds of each form by its name; None of those that are left out, and none where memory did not suffice."""
        executable, results = make(first)
        inputs = [self._normal(t.shape, t.dtype) for t in executable.steps.inputs]
        expected = executable(inputs)[:results]
        found: dict[str, float | None] = {}
        for form in forms:
            try:
                copies = [make(form)[0]]
                off = compare(copies[0](inputs)[:results], expected)
                if not all(x <= tolerance for x in off):
                    figures = ", ".join(f"{x:.2g}" for x in off)
                    _log.warning("%s is left out for %s: it is off by %s", form, call, figures)
                    found[str(form)] = None
                    continue
                for _ in range(1, self._copies(copies[0])):
                    copies.append(make(form)[0])
                    copies[-1](inputs)
                found[str(form)] = seconds([copy.launch for copy in copies], self._device)
            except Exception as error:
                if self._device.type == "cuda":  # an error after which nothing runs is not this form's alone
                    torch.cuda.current_stream(self._device).synchronize()
                if "INTERNAL ASSERT" in str(error):
                    raise
                _log.info("%s is left out for %s: %s", form, call, error)
                if not isinstance(error, torch.OutOfMemoryError):
                    found[str(form)] = None
        return found

    def _copies(self, executable: Executable) -> int:
        """How many copies of an executable's memory, and of the tensors that it reads, are larger than the cache."""
        if self._device.type != "cuda":
            return 1
        leaves = pytree.tree_leaves([step.arguments for step in executable.steps.steps])
        read = {t.data_ptr(): t.nbytes for t in leaves if isinstance(t, Tensor) and not t.is_meta}
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        return max(1, min(_MOST_COPIES, -(-2 * cache // (executable.bytes + sum(read.values())))))

    def _convolution(self, a: ConvArguments, weight: Tensor, form: Form) -> tuple[Executable, int]:
        steps, given = alone(a)
        packed = pack(weight, a.dtype, form.backend).clone()
        out, moments = lower_conv2d(form, steps, "conv2d", given, packed, self._arch)
        return self._executable(steps, [out, moments] if a.moments else [out])

    def _operator(self, op: str, arguments: Sequence[Any], form: Form) -> tuple[Executable, int]:
        steps = Steps()
        given = [steps.lend(x) if isinstance(x, Tensor) and x.is_meta else x for x in arguments]
        results = lower_operator(form, steps, op, op, given, self._arch)
        return self._executable(steps, list(results))

    def _executable(self, steps: Steps, results: list[Tensor]) -> tuple[Executable, int]:
        """A call alone, in memory of its own, and how many results its outputs begin with.

        The others are its inputs, which so stay as they are: it can be launched again.
        """
        outputs = [*results, *steps.inputs]
        steps.want(outputs)
        return Executable(steps, {}, [t.dtype for t in outputs], self._device, graphs=False), len(results)

    def _normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device).to(dtype)


#: Makes of a form what evaluates a call alone, and how many results its outputs begin with.
_Make = Callable[[Form], tuple[Executable, int]]


def _differences(found: Sequence[Tensor], expected: Sequence[Tensor], a: ConvArguments) -> list[float]:
    """How far outputs are from others, relative to their norm; and so the channels' means and standard deviations."""
    off = _relative(found[:1], expected[:1])
    if a.moments:
        positions = math.prod(a.output_shape()[2:])
        means, deviations = ([t[:, i].double() for t in (found[1], expected[1])] for i in range(2))
        deviations = [(t / positions).sqrt() for t in deviations]
        size = (means[1].square() + deviations[1].square()).sqrt().norm()
        off += [((x - exact).norm() / size).item() for x, exact in (means, deviations)]
    return off


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """How far results are from others, relative to the norm of each."""
    pairs = zip(found, expected, strict=True)
    return [((x.double() - exact.double()).norm() / exact.double().norm()).item() for x, exact in pairs]

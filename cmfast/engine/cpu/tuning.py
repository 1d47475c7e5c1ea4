"""Measure on this machine which form of each convolution is fastest, and remember it in a file."""

import json
import math
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...environment import processor
from ...files import whole_file
from ...kernels import native
from ...kernels.conv_arguments import ConvArguments
from ...kernels.conv_forms import ConvForm
from ...kernels.cpu.conv import launch_conv2d, pack
from ...kernels.layout import channels_last, empty_channels_last
from ..graph import arguments, shape
from .forms import candidates

#: Copies of the weights that are used in turn are larger than a processor's caches: a network's come from memory too.
_COLD_BYTES = 64 << 20
_ROUNDS = 5


class Tuner:
    """Chooses forms by measurement; what was measured before, on the same machine with as many threads, it knows."""

    def __init__(self, products: torch.dtype, path: Path | None) -> None:
        """Read what is known from the file `path`, if there is one.

        Raises:
            ValueError: the file is not one that `save` wrote.
        """
        self._products, self._path = products, path
        isa, threads = native.cpu().build_info()["isa"], torch.get_num_threads()
        self._machine = f"{processor()}, {isa}, {threads} threads, cmfast {metadata.version('cmfast')}"
        self._all: dict[str, dict[str, str]] = {}
        if path is not None and path.exists():
            try:
                self._all = json.loads(path.read_text())
                self._all.get(self._machine, {}).get("")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path} is not a file of measured forms ({error}): delete it") from error
        self._known = self._all.setdefault(self._machine, {})
        self._new = False

    def __call__(self, node: fx.Node) -> ConvForm:
        """The fastest form of a conv2d call among those that are accurate enough."""
        forms = {str(form): form for form in candidates(node, self._products)}
        layer = _describe(node, self._products)
        if self._known.get(layer) not in forms:
            seconds = {name: _measure(node, form) for name, form in forms.items()} if len(forms) > 1 else {}
            self._known[layer] = min(seconds, key=seconds.__getitem__, default=next(iter(forms)))
            self._new = True
        return forms[self._known[layer]]

    def save(self) -> None:
        """Write what was measured, where there is anything new."""
        if self._path is not None and self._new:
            with whole_file(self._path) as file:
                file.write_text(json.dumps(self._all, indent=1) + "\n")
            self._new = False


def _describe(node: fx.Node, products: torch.dtype) -> str:
    """All that the time of a convolution depends on."""
    a = arguments(node)
    sizes = [shape(a["weight"]), shape(a["h"]), None if a["skip"] is None else shape(a["skip"])]
    given = [name for name in ("gain", "silu", "residual", "relu", "moments") if a[name] not in (None, False)]
    how = [a[name] for name in ("stride", "padding", "resample", "residual_resample", "gate")]
    return f"{sizes} {how} {' '.join(given)} {products}"


def _measure(node: fx.Node, form: ConvForm) -> float:
    """Seconds of a call whose weights come from memory."""
    a = arguments(node)
    weight = torch.randn(shape(a["weight"]), dtype=torch.float32) / math.sqrt(math.prod(shape(a["weight"])[1:]))
    packed = pack(weight, *form)
    copies = [packed.clone() for _ in range(min(16, -(-_COLD_BYTES // packed.nbytes)))]
    images = {name: _random_image(a[name]) for name in ("h", "skip", "residual")}
    rows = {name: _random(a[name]) for name in ("gain", "offset", "bias")}
    same = {name: a[name] for name in ("stride", "padding", "resample", "silu", "gate", "relu", "residual_resample")}
    call = ConvArguments(weight=weight, packed=packed, **form._asdict(), **images, **rows, **same)
    out = empty_channels_last(weight, node.meta["val"][0].shape)
    moments = torch.empty(len(out), 2, out.shape[1], dtype=torch.float32, device="cpu") if a["moments"] else None
    program = native.cpu().Program()
    with native.recording(program):
        for copy in copies:
            launch_conv2d(out, moments, call._replace(packed=copy))
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        program.run(torch.get_num_threads())
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / len(copies)


def _random(node: Any) -> Tensor | None:
    return None if node is None else torch.randn(shape(node), dtype=torch.float32)


def _random_image(node: Any) -> Tensor | None:
    return None if node is None else channels_last(torch.randn(shape(node), dtype=torch.float32))

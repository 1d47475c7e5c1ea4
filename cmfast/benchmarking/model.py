"""One evaluation of a network: in plain torch, on cmfast's operators (eager), and accelerated.

Each output is compared with the same weights evaluated in float64 before it is timed, and must have been computed by
what its row names. All rows take turns, as a caller in Python sees them: until the result is there. "torch" and "eager"
have their channels first or last in memory, whichever is the faster for the batch.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerate import accelerate
from ..engine.trace import tracing
from ..kernels import BackendError, backends, use_backend
from ..unet import UNet
from .accuracy import WRONG, WrongResultError, relative_error
from .ceilings import ceilings
from .devices import Device
from .networks import inputs
from .plain_network import plain_operators
from .rounds import Candidate, Row, take_turns
from .serving import VoidError, watching

VARIANTS = ("torch", "eager", "accelerated")
#: Samples of a batch that are compared with float64.
_COMPARED = 2


class Evaluations:
    """A measurement of one network, whose rows can be read at any time.

    Attributes:
        ceilings: rows of what the machine can do at most, by their names.
        rows: one a batch size and variant.
    """

    def __init__(
        self,
        name: str,
        unet: UNet,
        device: Device,
        dtype: torch.dtype,
        batches: Sequence[int],
        *,
        variants: Sequence[str] = VARIANTS,
        rounds: int = 9,
    ) -> None:
        """Take a network in float32 on the device, in evaluation mode."""
        self.name, self.unet, self.device, self.dtype = name, unet, device, dtype
        self.batches, self.variants, self.rounds = batches, variants, rounds
        self.ceilings: dict[str, Row] = {}
        self.rows: list[Row] = []
        self._plain: dict[str | None, tuple[UNet, torch.memory_format]] = {}  # of "torch" and "eager", by layout

    @property
    def steps(self) -> int:
        """How often `measure` yields."""
        return 1 + len(self.batches) * len(self.variants) + self.rounds

    def measure(self) -> Iterator[str]:
        """Prepare and judge, then measure in rounds; yield what was done, each time."""
        dtype = str(self.dtype).removeprefix("torch.")
        exact = {batch: self._exact(batch) for batch in self.batches}
        yield "float64"
        candidates = []
        layouts = {variant: self._network(variant) for variant in self.variants}
        for batch in self.batches:
            given = inputs(self.unet.config, self.device.name, batch, self.dtype)
            for variant, calls in layouts.items():
                key = {"network": self.name, "batch": batch, "variant": variant, "dtype": dtype}
                row = Row(key, {"error": None}, control=variant == "torch")
                self.rows.append(row)
                layout, run = self._fastest({layout: _bound(call, given) for layout, call in calls.items()})
                row.facts["layout"] = layout
                try:
                    output = _output_of(variant, run)
                    row.facts["error"] = relative_error(output[:_COMPARED], exact[batch])
                    if not row.facts["error"] < WRONG[dtype]:
                        raise WrongResultError(f"off by {row.facts['error']:.2g} of the norm, allowed {WRONG[dtype]}")
                    candidates.append(Candidate(row, {"evaluation": self.device.clock(run)}))
                except (WrongResultError, BackendError) as error:
                    row.fail(f"{'wrong' if isinstance(error, WrongResultError) else 'void'}: {error}")
                yield f"{variant}, batch {batch}"
        limits = list(ceilings(self.device, [dtype], self.ceilings))
        for i in range(self.rounds):
            take_turns([*candidates, *limits], 1, first=i)
            yield f"round {i + 1}"

    @torch.inference_mode()
    def _exact(self, batch: int) -> Tensor:
        """The first samples' output of the definition in float64, of weights and inputs in the dtype measured."""
        x, *rest = inputs(self.unet.config, self.device.name, batch, self.dtype)
        wide = copy.deepcopy(self.unet).to(self.dtype).double()
        with use_backend("reference"):
            return wide(x[:_COMPARED].double(), *(t[:_COMPARED] for t in rest))

    def _network(self, variant: str) -> dict[str | None, Callable[..., Tensor]]:
        """A variant's network, in each of the layouts that it can have."""
        if variant == "accelerated":
            fast = accelerate(self.unet.to(self.dtype) if self.device.name == "cuda" else self.unet, self.dtype)
            own = next(fast.parameters()).dtype
            return {None: lambda x, *rest: fast(x.to(own), *rest)}
        if not self._plain:
            last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(self.unet.config.dims)
            for layout, order in {"channels first": torch.contiguous_format, "channels last": last}.items():
                if order is not None:
                    network = copy.deepcopy(self.unet).to(self.dtype).to(memory_format=order)  # type: ignore[call-overload]
                    self._plain[layout] = (network, order)

        def evaluating(network: UNet, order: torch.memory_format) -> Callable[..., Tensor]:
            def evaluate(x: Tensor, *rest: Tensor) -> Tensor:
                with plain_operators() if variant == "torch" else contextlib.nullcontext():
                    return network(x.contiguous(memory_format=order), *rest)

            return evaluate

        return {layout: evaluating(*plain) for layout, plain in self._plain.items()}

    def _fastest(self, runs: dict[str | None, Callable[[], Tensor]]) -> tuple[str | None, Callable[[], Tensor]]:
        """The fastest of the layouts, by the least of a few turns."""
        if len(runs) == 1:
            return next(iter(runs.items()))
        least = {}
        for layout, run in runs.items():
            timer = self.device.clock(run)
            least[layout] = min(timer.turn() for _ in range(3))
        layout = min(least, key=lambda layout: least[layout])
        return layout, runs[layout]


def _bound(call: Callable[..., Tensor], given: Sequence[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(*given)

    return run


def _output_of(variant: str, run: Callable[[], Any]) -> Tensor:
    """The output of a variant, once it is certain that it was computed by what the variant names.

    Raises:
        VoidError: it was not.
    """
    with watching() as found, tracing() as trace:
        output = run()
    served = " and ".join(f"{name} ({count})" for name, count in {**found.calls, **found.launches}.items()) or "none"
    if variant == "torch" and (found.calls or found.launches):
        raise VoidError(f"cmfast's operators were called: {served}")
    if variant == "eager":
        fastest = next(name for name in backends.BACKENDS if backends.available(name, "group_norm", [output])[0])
        if fastest != "reference" and not found.launches[fastest]:
            raise VoidError(f"no kernel of {fastest} was launched: {served}")
    if variant == "accelerated" and (trace.left or not trace.runs):
        reasons = "; ".join(sorted(set(trace.left.values()))) or "no program of the engine ran"
        raise VoidError(f"torch computed the network, or a part of it: {reasons}")
    return output

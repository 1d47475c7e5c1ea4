"""The stage that tunes: each call of the network, accelerated, in all forms that may serve it.

As `cmfast.accelerate(tune=True)` measures them: of a convolution other tiles than the rule's, and torch's; of attention
the kernels of both backends. The times are kept in a file, measured/forms-<card>.json in the folder of the results, to
be committed to cmfast/engine/cuda/measured. What a run before had measured, of the same card and versions, is not
measured again.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.triton.launch import architecture

from cmfast.engine import Accelerator
from cmfast.engine.cuda.forms import Choose, Form
from cmfast.engine.cuda.measurements import describe, describe_operator
from cmfast.engine.cuda.tuning import Tuner

from . import network, stage

#: Convolutions that are tuned in the dry run.
FEW = 2
#: Where the file is, in the folder of the results.
FOLDER = "measured"


class Noted:
    """Chooses as another does, and notes the calls, by their descriptions: what chooses for them, of a chooser."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.convolutions: dict[str, tuple[ConvArguments, Collection[str]]] = {}
        self.others: dict[str, tuple[str, Sequence[Any], Collection[str]]] = {}

    def __call__(self, a: ConvArguments, backends: Collection[str]) -> Form:
        self.convolutions.setdefault(describe(a), (a, backends))
        return self.choose(a, backends)

    def of_operator(self, op: str, arguments: Sequence[Any], backends: Collection[str]) -> Form:
        self.others.setdefault(describe_operator(op, arguments), (op, arguments, backends))
        return self.choose.of_operator(op, arguments, backends)


def noted(device, most: int | None = None) -> Noted:
    """The network's calls that several forms may serve, each once, in so many dtypes and batches."""
    found = None
    for dtype, batch in network.evaluations(device)[:most]:
        kind = getattr(torch, dtype)
        accelerator = Accelerator(network.network(device, kind), kind)
        found = found or Noted(accelerator.target.choose)
        accelerator.target.choose = found
        accelerator.executable(network.inputs(device, batch, kind))
        device.free()
    if device.emulated:
        found.convolutions = dict(list(found.convolutions.items())[-FEW:])
        found.others = dict(list(found.others.items())[-1:])
    return found


def cases(device, folder, until):
    """A call each."""
    place = torch.device("cuda", torch.cuda.current_device()) if device.name == "cuda" else torch.device(device.name)
    tuner = Tuner(place, architecture(place), folder / FOLDER)
    calls = noted(device)
    work = {call: functools.partial(tuner, *given) for call, given in calls.convolutions.items()}
    work |= {call: functools.partial(tuner.of_operator, *given) for call, given in calls.others.items()}
    for call, choose in work.items():
        yield stage.Case(call, functools.partial(tune, tuner, call, choose, device), patience=180, optional=True)


@torch.no_grad()
def tune(tuner: Tuner, call: str, choose: Callable[[], Form], device) -> list[dict]:
    """A row: the rule's form and the fastest, with their microseconds, and those that were left out."""
    chosen = str(choose())
    times = tuner.times(call)
    device.free()
    if not times:  # there is one form
        return []
    rule = next(iter(times))
    row = {"call": call, "rule": rule, "chosen": chosen, "forms": len(times)}
    for name in ("rule", "chosen"):
        if (seconds := times[row[name]]) is not None:
            row[f"{name}_us"] = float(f"{1e6 * seconds:.4g}")
    return [{**row, "left_out": [form for form, seconds in times.items() if seconds is None]}]


if __name__ == "__main__":
    stage.main("tuning", cases)

"""The stage that tunes: each convolution of the network, accelerated, in all forms that may serve it.

As `cmfast.accelerate(tune=True)` measures them: other tiles than the rule's, and torch's convolution. The times are
kept in a file, measured/forms-<card>.json in the folder of the results, to be committed to cmfast/engine/cuda/measured.
What a run before had measured, of the same card and versions, is not measured again.
"""

import functools
from collections.abc import Collection

import torch
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.triton.launch import architecture

from cmfast.engine import Accelerator
from cmfast.engine.cuda.forms import Form
from cmfast.engine.cuda.measurements import describe
from cmfast.engine.cuda.tuning import Tuner

from . import network, stage

#: Convolutions that are tuned in the dry run.
FEW = 2
#: Where the file is, in the folder of the results.
FOLDER = "measured"


def convolutions(device, most: int | None = None) -> list[tuple[ConvArguments, Collection[str]]]:
    """The network's convolutions, each once, and the backends that may serve them: of so many dtypes and batches."""
    found: dict[str, tuple[ConvArguments, Collection[str]]] = {}
    for dtype, batch in network.evaluations(device)[:most]:
        kind = getattr(torch, dtype)
        accelerator = Accelerator(network.network(device, kind), kind)
        choose = accelerator.target.choose

        def noted(a: ConvArguments, backends: Collection[str], choose=choose) -> Form:
            found.setdefault(describe(a), (a, backends))
            return choose(a, backends)

        accelerator.target.choose = noted
        accelerator.executable(network.inputs(device, batch, kind))
        device.free()
    return list(found.values())[-FEW if device.emulated else 0 :]


def cases(device, folder, until):
    """A convolution each."""
    place = torch.device("cuda", torch.cuda.current_device()) if device.name == "cuda" else torch.device(device.name)
    tuner = Tuner(place, architecture(place), folder / FOLDER)
    for a, backends in convolutions(device):
        work = functools.partial(tune, tuner, a, backends, device)
        yield stage.Case(describe(a), work, patience=180, optional=True)


@torch.no_grad()
def tune(tuner: Tuner, a: ConvArguments, backends: Collection[str], device) -> list[dict]:
    """A row: the rule's form and the fastest, with their microseconds, and those that were left out."""
    chosen = str(tuner(a, backends))
    times = tuner.times(a)
    device.free()
    if not times:  # there is one form
        return []
    rule = next(iter(times))
    row = {"call": describe(a), "rule": rule, "chosen": chosen, "forms": len(times)}
    for name in ("rule", "chosen"):
        if (seconds := times[row[name]]) is not None:
            row[f"{name}_us"] = float(f"{1e6 * seconds:.4g}")
    return [{**row, "left_out": [form for form, seconds in times.items() if seconds is None]}]


if __name__ == "__main__":
    stage.main("tuning", cases)

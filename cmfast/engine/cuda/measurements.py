"""How long the forms of convolutions took on a card: a file of JSON, which tuning writes and the rule reads.

Each card has a file of its own, `forms-<card>.json`, in the folder that `cmfast.accelerate` is given as its cache.
Files of known cards ship with the package, in the folder `measured`. A file says what it was measured with, and is used
where that is what is there: in a cache all of it; of the package's the card, the kernels and Triton.
"""

import dataclasses
import functools
import json
import logging
import re
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import whole_file
from ...kernels.conv_arguments import ConvArguments
from ...kernels.triton import VERSION

_log = logging.getLogger(__name__)

#: The files that ship with the package.
FOLDER = Path(__file__).parent / "measured"
#: What must be alike for a file of the package to be read.
_OF_KERNELS = ("card", "kernels", "triton")
#: Operations from which on a convolution tells how many a second there are.
_MANY_OPERATIONS = 1e9


@dataclasses.dataclass
class Measurements:
    """What was measured on a card.

    Attributes:
        versions: of all that the times depend on, the name of the card among them.
        launch_seconds: what a launch in a CUDA graph takes at least; 0 where it is not known.
        bytes_per_second: of the card's memory; 0 where that is not known.
        calls: each call that was measured, by its description, with the operations of a convolution ("flops"; 0 of any
            other), the dtype of its products and the seconds of each form; None for one that does not serve it.
    """

    versions: dict[str, str]
    launch_seconds: float = 0.0
    bytes_per_second: float = 0.0
    calls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def seconds(self, call: str) -> dict[str, float | None]:
        """The seconds of a call by its forms' names."""
        return self.calls.get(call, {}).get("seconds", {})

    def flops_per_second(self, backend: str, dtype: torch.dtype) -> float | None:
        """Operations a second of a backend's products: the median of the best for each large call, None without any."""
        rates = []
        for call in self.calls.values():
            if call["dtype"] == _name(dtype) and call["flops"] >= _MANY_OPERATIONS:
                found = [s for form, s in call["seconds"].items() if form.split()[0] == backend and s]
                rates += [call["flops"] / min(found)] if found else []
        return statistics.median(rates) if rates else None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with whole_file(path) as file:
            file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read(path: Path) -> Measurements:
    """The measurements of a file.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    try:
        found = Measurements(**json.loads(path.read_text()))
        calls = found.calls.values()
        seconds = [s for call in calls for s in call["seconds"].values() if s is not None]
        numbers = [found.launch_seconds, found.bytes_per_second, *seconds, *(call["flops"] for call in calls)]
        strings = [*found.versions.values(), *(call["dtype"] for call in calls)]
        if not all(isinstance(x, str) for x in strings) or not all(x >= 0 for x in numbers):
            raise TypeError("a version that is no string, or a time that is none")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of measured forms ({type(error).__name__}: {error})") from error
    return found


def file_name(card: str) -> str:
    """That of a card's file."""
    return f"forms-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def versions(device: torch.device) -> dict[str, str]:
    """What times on a device depend on, but for the calls themselves."""
    found = {
        "card": card(device),
        "kernels": str(VERSION),
        "triton": ".".join(_version("triton").split(".")[:2]),
        "cmfast": _version("cmfast"),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = str(torch.version.hip or torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return found


def card(device: torch.device) -> str:
    """The name of a device: of the CPU, that of what takes the launches there."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def shipped(device: torch.device) -> Measurements | None:
    """What the package knows of the card at hand, measured with the kernels and the Triton that are there."""
    here = versions(device)
    found = _shipped_files(FOLDER).get(here["card"])
    fits = found is not None and all(found.versions.get(name) == here[name] for name in _OF_KERNELS)
    return found if fits else None


def shipped_for(gpu: str) -> Measurements | None:
    """What the package knows of a card for which evaluations are planned, by a name of `kernels.static.GPUS`."""
    for name, found in _shipped_files(FOLDER).items():
        if gpu.lower() in name.lower().replace(" ", "") and found.versions.get("kernels") == str(VERSION):
            return found
    return None


@functools.cache
def _shipped_files(folder: Path) -> dict[str, Measurements]:
    """The files of a folder by their cards' names; a damaged one is reported and left out."""
    found = {}
    for path in sorted(folder.glob("forms-*.json")):
        try:
            measured = read(path)
            found[measured.versions["card"]] = measured
        except (ValueError, KeyError) as error:
            _log.warning("measurements that cannot be used: %s", error)
    return found


def describe(a: ConvArguments) -> str:
    """All that the time of a conv2d call depends on, but for the card, from arguments without data."""
    tensors = {name: getattr(a, name) for name in ("h", "skip", "gain", "residual", "bias")}
    found = [f"{name} {_layout(t)}" for name, t in tensors.items() if t is not None]
    found.append(f"weight {'x'.join(map(str, a.weight.shape))} {_name(a.dtype)}")
    found += [f"{name} {list(value)}" for name, value in (("stride", a.stride), ("padding", a.padding))]
    found += [f"{name} {getattr(a, name)}" for name in ("resample", "gate", "residual_resample") if getattr(a, name)]
    found += [name for name in ("silu", "relu", "moments") if getattr(a, name)]
    return ", ".join(found)


def describe_operator(op: str, arguments: Sequence[Any]) -> str:
    """The same of another operator's call, from its arguments in the order of its schema."""
    return f"{op}: {', '.join(_layout(x) if isinstance(x, Tensor) else str(x) for x in arguments)}"


def _layout(t: Tensor) -> str:
    """Shape and dtype, and strides where the tensor is not dense with its channels or its last dimension innermost."""
    dense = t.movedim(1, -1).is_contiguous() if t.ndim > 2 else t.is_contiguous()
    found = f"{'x'.join(map(str, t.shape))} {_name(t.dtype)}"
    return found if dense else f"{found} {t.stride()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"

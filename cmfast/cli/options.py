"""Options that several commands share, and how their values are read."""

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
import typer

from ..accelerate import accelerate
from ..checkpoints import first_line
from ..kernels import use_backend
from ..model import ConsistencyModel, load

Model = Annotated[
    str,
    typer.Option("--model", help="A bundled name (digits, fashion, drums, ...), a folder, a .pt file, or a hub id."),
]
Count = Annotated[int, typer.Option("--count", min=1, help="How many samples.")]
Sampler = Annotated[str | None, typer.Option(help="A sampler's name, such as heun; the model's own kind by default.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Evaluations of a consistency sampler, or levels of the others' grid.")
]
Timesteps = Annotated[
    str | None, typer.Option(help="Instead of steps: indices on the Karras grid of 40, such as 0,22.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the counter-based noise.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Samples at a time; the results do not depend on it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one by default.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16: what the network computes in.")]
Backend = Annotated[str, typer.Option(help="Which kernels serve the operators; auto takes the fastest.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Accelerate = Annotated[
    bool, typer.Option("--accelerate", help="Evaluate the network by the engine; dtype: of products.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; torch's choice by default.")]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    source: str, device: str | None, dtype: str, accelerated: bool = False, backend: str = "auto"
) -> ConsistencyModel:
    """Load a model where and in which precision the options say, accelerated on a backend or as it is."""
    precision, place = dtype_of(dtype), device_of(device)
    if not accelerated:
        return load(source, device=place, dtype=precision)
    model = accelerate(load(source, device=place), precision, backend=None if backend == "auto" else backend)
    assert isinstance(model, ConsistencyModel)
    return model


def device_of(name: str | None) -> torch.device:
    """The device of the option: a GPU where there is one by default."""
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, or one of several GPUs, such as cuda:1, got {name}")
    return place


def dtype_of(name: str) -> torch.dtype:
    """The dtype of the option."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name}")
    return _DTYPES[name]


def kernels_of(backend: str) -> AbstractContextManager[None]:
    """The context in which the operators are served by the backend of the option."""
    return nullcontext() if backend == "auto" else use_backend(backend)


def integers(text: str | None, option: str) -> list[int] | None:
    """Read "0,22" as [0, 22]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be integers separated by commas, got {text!r}") from error


def numbers(text: str | None, option: str) -> list[float] | None:
    """Read "80,0.8" as [80.0, 0.8]."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, got {text!r}") from error

"""Where the time of a network goes, by operator and by layer: on any device, accelerated or not."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..engine.explanation import module_names
from ..environment import processor
from ..model import ConsistencyModel
from .ceilings import measure_ceilings
from .measurement import Measured, measure
from .memory import Memory
from .profile import Group, Profile, Row, rows_of
from .sampling import measure_sampling

__all__ = ["Group", "Memory", "Profile", "Row", "profile_call", "profile_sampling"]


def profile_call(
    call: Callable[[], Any], networks: Mapping[str, nn.Module], title: str, *, rounds: int | None = None
) -> Profile:
    """Profile a call that evaluates networks, which have these names in it.

    Args:
        call: what is measured.
        networks: by their names: those of their modules begin with it.
        title: what the report says was measured.
        rounds: how often the call is made as it is, and as often recorded; None means until both agree: see
            `measurement.measure`.
    """
    first = next(iter(networks.values()))
    tensors = [t for network in networks.values() for t in (*network.parameters(), *network.buffers())]
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    names = module_names(networks)
    network = type(first).__name__ if len(networks) == 1 else title
    return _profile(measure(call, names, device, rounds), names, device, title, network)


def profile_sampling(
    model: ConsistencyModel,
    count: int,
    title: str = "sampling",
    *,
    sampler: str | None = None,
    steps: int | None = None,
    rounds: int | None = None,
) -> Profile:
    """Profile `model.sample(count, sampler=sampler, steps=steps)`, whose rows have stages.

    See `sampling.measure_sampling` for the stages, and `profile_call` for the title and the rounds.

    Raises:
        ValueError: an unknown sampler, or a number of steps that it does not take.
    """
    measured = measure_sampling(model, count, sampler=sampler, steps=steps, rounds=rounds)
    names = {module: name for name, module in model.named_modules()}
    return _profile(measured, names, model.device, title, type(model).__name__)


def _profile(
    measured: Measured, names: Mapping[nn.Module, str], device: torch.device, title: str, network: str
) -> Profile:
    recording = measured.recording
    dtypes = {operation.products for operation in recording.operations if operation.products is not None}
    runs = recording.trace.runs
    programs = {id(run.executable): run.executable.bytes for run in runs}
    weights = {id(run.target): run.target.bytes for run in runs}
    # Without programs, what all operators move is the nearest to what their values and weights take.
    touched = sum((programs | weights).values()) or sum(operation.bytes for operation in recording.operations)
    ceilings = measure_ceilings(device, dtypes, touched)
    return Profile(
        title=f"{title}, {machine(device)}",
        network=network,
        seconds=measured.seconds,
        median_seconds=measured.median_seconds,
        rounds=measured.rounds,
        rows=rows_of(recording.operations, measured.outside, ceilings),
        ceilings=ceilings,
        timeline=recording.operations,
        trace=recording.trace,
        names=names,
    )


def machine(device: torch.device) -> str:
    """What a network runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()}"

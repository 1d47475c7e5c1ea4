"""Snapshots of power-function averages, written as a training runs, and the averages of any length made of them."""

from pathlib import Path

import safetensors
import torch
from torch import nn

from ..checkpoints import CheckpointError
from ..checkpoints.tensors import write_safetensors
from ..files import whole_file
from .averages import Averages, averaged_copy
from .checkpoint import apart
from .power import gamma_of, solve


def write_snapshot(folder: Path, averages: Averages, iteration: int) -> None:
    """Write the power-function averages after so many updates, in float16, whole or not at all."""
    tensors = {
        f"{name}/{key}": value.half() if value.is_floating_point() else value
        for name, model in averages.models.items()
        if name.startswith("power-")
        for key, value in model.state_dict().items()
    }
    with whole_file(folder / f"{iteration:09d}.safetensors") as file:
        write_safetensors(file, apart(tensors))


def found(folder: Path) -> dict[int, Path]:
    """The snapshots of a folder by their updates, the last one last."""
    return {int(path.stem): path for path in sorted(folder.glob("[0-9]*.safetensors")) if path.stem.isdecimal()}


def remove_snapshots(folder: Path, iteration: int) -> None:
    """Remove those after so many updates, from which a training is begun or resumed, and what is half written."""
    for path in (*folder.glob(".[0-9]*.safetensors"), *(p for i, p in found(folder).items() if i > iteration)):
        path.unlink()


def reconstruct(folder: str | Path, model: nn.Module, sigma_rel: float, iteration: int | None = None) -> nn.Module:
    """A copy of the model with the weights of a power-function average of another length.

    Args:
        folder: where a training wrote its snapshots: `snapshots` in its folder.
        model: of the training's architecture; its weights are not read.
        sigma_rel: standard deviation of the average's profile, as a fraction of the training until then. From 32
            snapshots of 0.05 and 0.1, profiles of 0.03 to 0.2 are met to one part in a hundred or better.
        iteration: after how many updates, of which there must be a snapshot; None for the last one.

    Returns:
        The copy, in evaluation mode. Buffers are those of the last snapshot.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: sigma_rel is out of range, or there is no snapshot after so many updates.
        CheckpointError: the snapshots are of another network.
    """
    files = found(Path(folder))
    if not files:
        raise FileNotFoundError(f"no snapshots of averages in {folder}")
    last = max(files) if iteration is None else iteration
    times = [time for time in files if time <= last]
    if last not in files:  # the profile ends there
        near = sorted(files, key=lambda time: abs(time - last))[:2]
        raise ValueError(
            f"iteration: there is no snapshot after {last} updates, the nearest are {' and '.join(map(str, near))}"
        )
    opened = {time: safetensors.safe_open(files[time], "pt") for time in times}
    names = sorted({key.split("/")[0] for key in opened[times[0]].keys()})  # noqa: SIM118
    tracks = [(time, name) for time in times for name in names]
    gammas = [gamma_of(float(name.removeprefix("power-"))) for _, name in tracks]
    factors = solve([time for time, _ in tracks], gammas, last, gamma_of(sigma_rel))
    result = averaged_copy(model)
    parameters = dict(result.named_parameters())
    try:
        with torch.no_grad():
            for key, value in result.state_dict().items():
                latest = opened[times[-1]].get_tensor(f"{names[0]}/{key}")
                if latest.shape != value.shape:
                    raise CheckpointError(f"{folder}: {key} is {list(latest.shape)}, expected {list(value.shape)}")
                if key in parameters:
                    total = torch.zeros(value.shape, dtype=torch.float64)
                    for (time, name), factor in zip(tracks, factors, strict=True):
                        total += factor * opened[time].get_tensor(f"{name}/{key}").double()
                    latest = total
                value.copy_(latest)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder} has the snapshots of another network: {error}") from error
    return result

"""`cmfast sample`: draw samples, to be looked at or listened to and as numbers, or in bulk into a folder."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ..bulk import process_of
from ..checkpoints.tensors import write_safetensors
from ..files import check_writable, whole_file
from ..finite import check_finite
from ..model import ConsistencyModel
from ..pictures import save_animation, save_png, save_spectrograms
from ..sound import save_wav
from . import options
from .bulk import sample_in_bulk
from .options import integers, kernels_of, load_model, numbers


def sample(
    model: options.Model = "digits",
    count: options.Count = 16,
    steps: options.Steps = None,
    timesteps: options.Timesteps = None,
    sigmas: Annotated[str | None, typer.Option(help="Instead of steps: the levels themselves, such as 80,0.8.")] = None,
    sampler: options.Sampler = None,
    class_labels: Annotated[
        str | None, typer.Option("--class", help="A class for all, or one a sample (3,1,4); all in turn by default.")
    ] = None,
    seed: options.Seed = 0,
    first_sample: Annotated[int, typer.Option(min=0, help="Index of the first sample, to continue a run.")] = 0,
    batch_size: options.BatchSize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .png: a grid of images, rows of frames, or spectrograms; a .gif or .apng of clips; a .wav of "
            "sounds, one after another. Or a folder, for bulk sampling."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the samples as numbers: .npz or .safetensors.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    threads: options.Threads = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    format: Annotated[
        str | None, typer.Option(help="In bulk: npz, png, or tar (for WebDataset); npz by default.")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="In bulk: samples of a shard; 1024 by default.")] = None,
    dtype_out: Annotated[
        str | None, typer.Option(help="In bulk: uint8 or float32; uint8 for images and videos by default.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, help="In bulk: which process this is; as torchrun or Slurm say by default.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="In bulk: how many there are; for Kubernetes, how many completions.")
    ] = None,
) -> None:
    """Draw samples of a model. Sample i depends on the weights, the seed and i alone.

    With a folder as --out, samples are written in shards by as many processes as share the folder, each by the same
    command, which may be killed and started again: docs/bulk.md.
    """
    labels, of_bulk = integers(class_labels, "--class"), (format, shard_size, dtype_out, process, processes)
    plan: dict[str, Any] = {
        "class_labels": labels[0] if labels is not None and len(labels) == 1 else labels,
        "steps": steps,
        "timesteps": integers(timesteps, "--timesteps"),
        "sigmas": numbers(sigmas, "--sigmas"),
        "sampler": sampler,
        "seed": seed,
        "first_sample": first_sample,
    }
    if out is not None and _is_folder(out, format):
        if save is not None:
            raise ValueError(f"--save writes one file of all samples: it does not go with the folder {out}")
        sample_in_bulk(
            (model, device, dtype, accelerate, backend),
            out,
            count,
            process_of(process, processes),
            threads,
            progress,
            {"format": format, "shard_size": shard_size, "dtype_out": dtype_out, "batch_size": batch_size},
            plan,
        )
        return
    if any(option is not None for option in of_bulk):
        raise ValueError("--format, --shard-size, --dtype-out, --process and --processes need a folder as --out")
    if out is None and save is None:
        raise ValueError("nothing to write: give --out samples.png, --save samples.npz, or both")
    if save is not None and save.suffix.lower() not in (".npz", ".safetensors"):
        raise ValueError(f"{save} must end in .npz or .safetensors")
    for path in (out, save):
        if path is not None:
            check_writable(path)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(model, device, dtype, accelerate, backend)
    if out is not None:
        _check_kind(out, loaded, model)
    with kernels_of(backend):
        samples = loaded.sample(count, **plan, batch_size=batch_size, progress=progress).cpu()
    if save is not None:
        _save_numbers(samples, save)
        print(f"{save}: {count} samples {list(samples.shape[1:])}, float32")
    if out is not None:
        in_turn = loaded.num_classes is not None and labels is None and loaded.num_classes <= 20
        in_turn &= samples.ndim < 5 or out.suffix.lower() != ".png"  # where a clip takes a row of its own
        _save(samples, out, loaded, columns=loaded.num_classes if in_turn else None)
        print(f"{out}: {count} samples")


def _is_folder(out: Path, format: str | None) -> bool:
    """Whether --out is a folder, for bulk sampling: a name without an ending, or any name with --format."""
    file = out.suffix.lower() in _KINDS
    if format is not None and file:
        raise ValueError(f"--format {format} writes a folder, and {out} is the name of a file")
    if not file and format is None and out.suffix and not out.is_dir():
        raise ValueError(
            f"{out} must end in {', '.join(_KINDS)}, or be a folder: of a new one with such a name, give the --format"
        )
    return not file


#: What the files of each ending hold, by the dimensions of a sample: 1 for sound, 2 for images, 3 for video.
_KINDS = {".png": (1, 2, 3), ".gif": (3,), ".apng": (3,), ".wav": (1,)}
_NAMES = {1: "sound", 2: "images", 3: "video"}


def _check_kind(out: Path, model: ConsistencyModel, name: str) -> None:
    """Raise ValueError where the file cannot hold what the model draws (before it draws)."""
    suffix, dims = out.suffix.lower(), len(model.sample_shape) - 1
    if dims not in _KINDS[suffix]:
        fitting = [ending for ending, kinds in _KINDS.items() if dims in kinds]
        raise ValueError(
            f"{out}: a {suffix} file is for {_NAMES[_KINDS[suffix][0]]}, and {name} draws {_NAMES[dims]} "
            f"{list(model.sample_shape)}: give a name that ends in {' or '.join(fitting)}"
        )
    channels = model.sample_shape[0]
    if dims > 1 and channels not in (1, 3):
        raise ValueError(
            f"{out}: {name} draws samples of {channels} channels, and pictures have 1 or 3: "
            "--save writes them as numbers"
        )
    if suffix == ".wav" and model.representation is None:
        raise ValueError(f"{out}: {name} does not say its sampling rate (it has no representation): give a .png")


def _save(samples: Tensor, out: Path, model: ConsistencyModel, columns: int | None) -> None:
    """Write samples to a file by its ending; sound is made of them first, where the model says how."""
    if model.representation is not None:
        waveforms, rate = model.representation.decode(samples), model.representation.sample_rate
        if out.suffix.lower() == ".wav":
            save_wav(waveforms, out, rate)
        else:
            save_spectrograms(waveforms, out, rate, columns)
    elif out.suffix.lower() == ".png":
        save_png(samples, out, columns)
    else:
        save_animation(samples, out, columns)


def _save_numbers(samples: Tensor, path: Path) -> None:
    check_finite(samples)
    with whole_file(path) as file:
        if path.suffix.lower() == ".npz":
            with file.open("wb") as stream:  # to a name, numpy adds .npz where it ends in .NPZ
                np.savez(stream, samples=samples.numpy())
        else:
            write_safetensors(file, {"samples": samples.contiguous()})

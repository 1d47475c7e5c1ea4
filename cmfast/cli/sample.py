"""`cmfast sample`: draw samples, as a picture and as numbers."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from ..files import check_writable, whole_file
from ..pictures import save_png
from . import options
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
        Path | None, typer.Option(help="Write a PNG: a grid of images, rows of frames, or waveforms.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the samples as numbers: .npz or .safetensors.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    threads: options.Threads = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Draw samples of a model. Sample i depends on the weights, the seed and i alone."""
    if out is None and save is None:
        raise ValueError("nothing to write: give --out samples.png, --save samples.npz, or both")
    for path, suffixes in ((out, (".png",)), (save, (".npz", ".safetensors"))):
        if path is not None:
            if path.suffix.lower() not in suffixes:
                raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
            check_writable(path)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(model, device, dtype, accelerate, backend)
    labels = integers(class_labels, "--class")
    with kernels_of(backend):
        samples = loaded.sample(
            count,
            class_labels=labels[0] if labels is not None and len(labels) == 1 else labels,
            steps=steps,
            timesteps=integers(timesteps, "--timesteps"),
            sigmas=numbers(sigmas, "--sigmas"),
            sampler=sampler,
            seed=seed,
            first_sample=first_sample,
            batch_size=batch_size,
            progress=progress,
        ).cpu()
    if save is not None:
        _save_numbers(samples, save)
        print(f"{save}: {count} samples {list(samples.shape[1:])}, float32")
    if out is not None:
        in_turn = loaded.num_classes is not None and labels is None and loaded.num_classes <= 20
        save_png(samples, out, columns=loaded.num_classes if in_turn else None)
        print(f"{out}: {count} samples")


def _save_numbers(samples: Tensor, path: Path) -> None:
    with whole_file(path) as file:
        if path.suffix.lower() == ".npz":
            np.savez(file, samples=samples.numpy())
        else:
            save_file({"samples": samples.contiguous()}, file)

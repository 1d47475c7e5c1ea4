"""diffusers' format: the folder of a UNet2DModel, or of a ConsistencyModelPipeline (a network and a scheduler)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import whole_folder
from ..preconditioning import Consistency, Preconditioning
from . import diffusers_config as configs
from .checkpoint import Checkpoint, CheckpointError, check_weights, expected_weights, recommended_levels
from .diffusers_names import from_diffusers, to_diffusers
from .tensors import read_json, read_pickle, read_safetensors, read_shards, write_json, write_safetensors

#: The file that makes a folder a pipeline's; its parts; and one of cmfast's own, for what diffusers' cannot say.
INDEX, NETWORK, SCHEDULER, EXTRA = "model_index.json", "unet", "scheduler", "cmfast.json"
PIPELINE = "ConsistencyModelPipeline"
#: How the names of weights begin, and how they end: what is preferred first.
STEM, SUFFIXES = "diffusion_pytorch_model", ("safetensors", "bin")
#: The first version of diffusers with all the settings that are written.
_VERSION = "0.20.0"


def read(
    path: Path,
    preconditioning: Preconditioning | None = None,
    variant: str | None = None,
    image_size: int | tuple[int, ...] | None = None,
) -> Checkpoint:
    """Read the folder of a pipeline or of a network.

    Args:
        path: of the folder.
        preconditioning: takes the place of the scheduler's. A network's folder has none, and gets `Consistency()`.
        variant: which of the folder's weights, such as "fp16"; None for those whose names have no variant.
        image_size: where the network's configuration has no sample_size.

    Raises:
        FileNotFoundError: files are missing, or there are weights of other variants only.
        CheckpointError: files are damaged, or `UNet` has no such network, or cmfast no such scheduler.
    """
    folder, levels = network_folder(path), {}
    if folder != path:
        own, extra, scheduler = None, path / EXTRA, path / SCHEDULER / "scheduler_config.json"
        if preconditioning is None or extra.is_file():
            own = configs.preconditioning(read_json(scheduler), str(scheduler))
        if extra.is_file():
            levels = _recommended_levels(extra, own, preconditioning)
        preconditioning = preconditioning or own
    content = read_json(folder / "config.json")
    config = configs.unet_config(content, str(folder / "config.json"), image_size)
    source = weights_file(folder, variant)
    if source is None:
        raise FileNotFoundError(_no_weights(folder, variant))
    weights = _reader(source)(source)
    expected = expected_weights(config)
    check_weights(to_diffusers(config, expected), weights, source)
    named = from_diffusers(config, expected, weights, str(source))
    return Checkpoint(config, named, preconditioning or Consistency(), levels, str(source))


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the folder of a ConsistencyModelPipeline, whole or not at all.

    Levels that are recommended for a number of steps go to a file of their own, cmfast.json, which diffusers ignores.

    Raises:
        ValueError: diffusers has no such network, or no scheduler of such a preconditioning.
        FileExistsError: the folder is there and not empty.
        OSError: the folder cannot be written to.
    """
    network = configs.unet2d_config(checkpoint.config)
    scheduler = configs.scheduler_config(checkpoint.preconditioning)
    weights = {name: value.contiguous() for name, value in to_diffusers(checkpoint.config, checkpoint.weights).items()}
    parts = {NETWORK: ["diffusers", configs.NETWORK], SCHEDULER: ["diffusers", configs.SCHEDULER]}
    with whole_folder(path) as folder:
        write_json(folder / INDEX, {"_class_name": PIPELINE, "_diffusers_version": _VERSION, **parts})
        for part, name, class_name, content in (
            (NETWORK, "config.json", configs.NETWORK, network),
            (SCHEDULER, "scheduler_config.json", configs.SCHEDULER, scheduler),
        ):
            (folder / part).mkdir()
            write_json(folder / part / name, {"_class_name": class_name, "_diffusers_version": _VERSION, **content})
        write_safetensors(folder / NETWORK / f"{STEM}.safetensors", weights, {"format": "pt"})
        if checkpoint.recommended_levels:
            levels = {str(steps): list(values) for steps, values in checkpoint.recommended_levels.items()}
            write_json(folder / EXTRA, {"recommended_levels": levels})


def network_folder(path: Path) -> Path:
    """Where the network of a pipeline's or a network's folder is.

    Raises:
        FileNotFoundError: its configuration is missing.
        CheckpointError: it is another class of diffusers.
    """
    pipeline = (path / INDEX).is_file()
    folder = path / NETWORK if pipeline else path
    if pipeline:
        _check_class(path, read_json(path / INDEX), PIPELINE)
    _check_class(folder, read_json(folder / "config.json"), configs.NETWORK)
    return folder


def weights_file(folder: Path, variant: str | None = None) -> Path | None:
    """The file with a network's weights, or the index of their shards; None where there is none of the variant."""
    return next((folder / name for name in _weight_names(variant) if (folder / name).is_file()), None)


def _check_class(path: Path, content: dict[str, Any], expected: str) -> None:
    if (name := content.get("_class_name")) != expected:
        raise CheckpointError(
            f"{path} holds a {name} of diffusers; cmfast.load reads a {configs.NETWORK} or a {PIPELINE}. "
            "cmfast.accelerate takes any network: load it with diffusers and give it to cmfast.accelerate"
        )


def _recommended_levels(
    path: Path, own: Preconditioning | None, given: Preconditioning | None
) -> dict[int, tuple[float, ...]]:
    try:
        return recommended_levels(read_json(path)["recommended_levels"], own, given)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a configuration written by cmfast: {error!r}") from error


def _reader(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    return {".json": read_shards, ".bin": read_pickle}.get(path.suffix, read_safetensors)


def _weight_names(variant: str | None) -> list[str]:
    """Names of a network's weights in diffusers' order of preference: whole, or the index of shards."""
    mark = f".{variant}" if variant else ""
    return [name for suffix in SUFFIXES for name in (f"{STEM}{mark}.{suffix}", f"{STEM}.{suffix}.index{mark}.json")]


def _no_weights(folder: Path, variant: str | None) -> str:
    found = sorted({v for file in folder.iterdir() if (v := _variant(file.name)) is not None})
    if found:
        hint = f"there are weights for {', '.join(f'variant={v!r}' for v in found)}"
    else:
        hint = "try variant=None" if variant else "where there are weights of a variant only, give it: variant='fp16'"
    asked = f" of the variant {variant!r}" if variant else ""
    return f"no weights{asked} in the folder {folder}: {_weight_names(variant)[0]} is missing; {hint}"


def _variant(name: str) -> str | None:
    """The variant of the weights' file of this name; None where it has none or is another file."""
    pattern = rf"{STEM}\.(?:(?:safetensors|bin)\.index\.([^.]+)\.json|([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin))"
    match = re.fullmatch(pattern, name)
    return match and (match[1] or match[2])

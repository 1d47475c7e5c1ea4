"""Weights in and out: bundled models, safetensors folders, OpenAI's `.pt` files."""

import dataclasses
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import preconditioning as schemes
from .files import whole_file
from .model import ConsistencyModel
from .preconditioning import Preconditioning
from .unet import UNet, UNetConfig

#: The models that come with cmfast, by the names that `load` takes.
BUNDLED = ("digits", "digits-teacher")

#: Sizes that OpenAI's networks were trained on, by their channel_mult (guided-diffusion's script_util.py).
_OPENAI_IMAGE_SIZES = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class CheckpointError(ValueError):
    """A file is not a checkpoint that cmfast can read; the message says what it holds and what was expected."""


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    preconditioning: Preconditioning | None = None,
    **config: Any,
) -> ConsistencyModel:
    """Load a model: a bundled name, a folder that `save` wrote, or one of OpenAI's `.pt` files.

    Args:
        source: a name of `BUNDLED`, or a path.
        device: where to put the parameters.
        dtype: of the parameters, whatever the file stores.
        preconditioning: replaces the file's own. A `.pt` file has none: `Consistency()`, or `EDM()` where its name
            begins with "edm", as the released ones do.
        **config: for a `.pt` file, fields of UNetConfig. Those that the weights determine are read off them and must
            agree; image_size, num_heads or num_head_channels and dropout are not determined, and have the released
            models' values unless given.

    Raises:
        FileNotFoundError: there is no such name or path.
        ValueError: the device is a GPU, and torch sees none.
        CheckpointError: the file is truncated, holds other things than tensors, or is another model's.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"load: the device {device} was asked for, and torch {torch.__version__} sees no GPU here")
    path = _bundled_path(str(source)) if str(source) in BUNDLED else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: expected a path or one of {', '.join(BUNDLED)}")
    if path.is_dir():
        if config:
            raise ValueError(f"{path} has its configuration in {_CONFIG}: {', '.join(config)} cannot be given")
        model = _load_folder(path, preconditioning)
    else:
        model = _load_openai(path, preconditioning, config)
    return model.to(device=device, dtype=dtype).eval()


def save(model: ConsistencyModel, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder with model.safetensors and config.json, each of them whole or not at all.

    Args:
        model: a model whose network is a `UNet`, accelerated or not.
        path: of the folder; made where it is missing.
        dtype: to store the weights in; None keeps theirs.

    Raises:
        ValueError: the network is not a UNet, or has given up its weights.
        OSError: the folder cannot be written to.
    """
    unet = model.unet
    if not isinstance(unet, UNet):
        raise ValueError(f"save: only models of a cmfast.UNet can be saved, got {type(unet).__name__}")
    if any(p.is_meta for p in unet.parameters()):
        raise ValueError("save: this model gave up its weights when it was accelerated (keep_weights=False)")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
    config = {
        "format": "cmfast",
        "unet": dataclasses.asdict(unet.config),
        "preconditioning": {"type": type(model.preconditioning).__name__, **dataclasses.asdict(model.preconditioning)},
        "recommended_levels": {str(steps): list(levels) for steps, levels in model.recommended_levels.items()},
    }
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in unet.state_dict().items()}
    with whole_file(path / _WEIGHTS) as weights_file, whole_file(path / _CONFIG) as config_file:
        save_file(weights, weights_file)
        config_file.write_text(json.dumps(config, indent=2) + "\n")


def asset(name: str) -> Path:
    """Path of a file that comes with cmfast."""
    return Path(str(resources.files("cmfast"))) / "assets" / name


def _bundled_path(name: str) -> Path:
    return asset(name)


def _load_folder(path: Path, preconditioning: Preconditioning | None) -> ConsistencyModel:
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no model in the folder {path}: {name} is missing")
    try:
        config = json.loads((path / _CONFIG).read_text())
        unet = _without_weights(UNetConfig(**config["unet"]))
        scheme = dict(config["preconditioning"])
        own = getattr(schemes, scheme.pop("type"))(**scheme)
        levels = config.get("recommended_levels", {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / _CONFIG} is not a configuration written by cmfast: {error!r}") from error
    try:
        weights = load_file(path / _WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / _WEIGHTS} is not a whole safetensors file: {error}") from error
    _load_weights(unet, weights, path / _WEIGHTS)
    return ConsistencyModel(unet, preconditioning or own, recommended_levels=levels)


def _load_openai(path: Path, preconditioning: Preconditioning | None, given: dict[str, Any]) -> ConsistencyModel:
    weights = _read_pt(path)
    config = openai_config(weights, given, path)
    unet = _without_weights(config)
    _load_weights(unet, weights, path)
    if preconditioning is None:
        preconditioning = schemes.EDM() if path.name.startswith("edm") else schemes.Consistency()
    return ConsistencyModel(unet, preconditioning)


def _without_weights(config: UNetConfig) -> UNet:
    """A network that is not filled with random numbers first, which would take longer than all else."""
    with torch.device("meta"):
        return UNet(config)


def _read_pt(path: Path) -> dict[str, Tensor]:
    """The state_dict in a `.pt` file; only tensors are unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something else than tensors (or is no checkpoint); it was not loaded, "
            "since unpickling it could run code"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise CheckpointError(f"{path} is not a whole PyTorch file: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()) or not weights:
        raise CheckpointError(f"{path} does not hold a state_dict (names to tensors) but {_kind(weights)}")
    return weights


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, list(value)[:5]))}" if value else "an empty dict"
    return f"a {type(value).__name__}"


def openai_config(
    weights: Mapping[str, Tensor], given: Mapping[str, Any] | None = None, source: object = ""
) -> UNetConfig:
    """Read a UNetConfig off a state_dict of OpenAI's U-Net.

    Args:
        weights: names to tensors.
        given: fields that the weights do not determine, or that must agree with them.
        source: named in errors.

    Raises:
        CheckpointError: the names are not those of such a network, or `given` contradicts them.
    """
    given = dict(given or {})
    fields = {field.name for field in dataclasses.fields(UNetConfig)}
    if unknown := set(given) - fields:
        raise ValueError(
            f"unknown configuration fields {', '.join(sorted(unknown))}: UNetConfig has {', '.join(sorted(fields))}"
        )
    try:
        read = _determined(weights)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source} is not the state_dict of an OpenAI U-Net: {error} is missing among names like "
            f"{', '.join(list(weights)[:3])}"
        ) from error
    for name, value in given.items():
        wanted = tuple(value) if isinstance(value, list) else value
        if name in read and read[name] != wanted:
            raise CheckpointError(f"{source}: the weights have {name} {read[name]}, but {value} was given")
    rest: dict[str, Any] = {"dropout": 0.0}
    if not {"num_heads", "num_head_channels"} & set(given):
        rest["num_head_channels"] = 64
    if "image_size" not in given:
        if read["channel_mult"] not in _OPENAI_IMAGE_SIZES:
            raise CheckpointError(
                f"{source}: no released model has channel_mult {read['channel_mult']}: give image_size"
            )
        rest["image_size"] = _OPENAI_IMAGE_SIZES[read["channel_mult"]]
    try:
        return UNetConfig(**{**rest, **read, **given})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _determined(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of UNetConfig that follow from the names and shapes of the weights."""
    first = weights["input_blocks.0.0.weight"]
    model_channels = weights["time_embed.0.weight"].shape[1]
    indices = [int(m[1]) for key in weights if (m := re.match(r"output_blocks\.(\d+)\.", key))]
    if not indices:
        raise KeyError("output_blocks.0.0.in_layers.0.weight")
    blocks = max(indices) + 1

    # The last block of each level but the finest ends in an upsampling layer: a residual block, or a convolution.
    # Without weights for it, it shows as a hole in the list of input blocks.
    res_ups = [k for k in range(blocks) if any(f"output_blocks.{k}.{i}.in_layers.0.weight" in weights for i in (1, 2))]
    conv_ups = [k for k in range(blocks) if any(f"output_blocks.{k}.{i}.conv.weight" in weights for i in (1, 2))]
    holes = [k - 1 for k in range(1, blocks) if not any(key.startswith(f"input_blocks.{k}.") for key in weights)]
    per_level = ([*res_ups, *conv_ups, *holes] or [blocks - 1])[0] + 1
    starts = [1 + level * per_level for level in range(blocks // per_level)]
    channels = [weights[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0] for k in starts]
    embedded = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return {
        "in_channels": first.shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "model_channels": model_channels,
        "channel_mult": tuple(c // model_channels if c % model_channels == 0 else c / model_channels for c in channels),
        "num_res_blocks": per_level - 1,
        "attention_resolutions": tuple(
            2**level for level, k in enumerate(starts) if f"input_blocks.{k}.1.qkv.weight" in weights
        ),
        "num_classes": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        "use_scale_shift_norm": embedded == 2 * channels[0],
        "resblock_updown": bool(res_ups),
        "conv_resample": not holes,
        "dims": first.ndim - 2,
    }


def _load_weights(unet: UNet, weights: Mapping[str, Tensor], source: object) -> None:
    own = unet.state_dict()
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    problems = [
        f"{len(names)} names {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for names, what in ((missing, "are missing"), (extra, "are not this network's"), (shapes, "have other shapes"))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} holds the weights of another network: {'; '.join(problems)}")
    unet.load_state_dict(dict(weights), assign=True)

"""OpenAI's format: a `.pt` file with a state_dict, as consistency_models has it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import preconditioning as schemes
from ..files import whole_file
from ..preconditioning import Preconditioning
from ..unet import UNetConfig
from .checkpoint import Checkpoint, CheckpointError, channel_multiples, without_flags
from .tensors import read_pickle

#: Sizes that OpenAI's networks were trained on, by their channel_mult (guided-diffusion's script_util.py).
_IMAGE_SIZES = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}


def read(
    path: Path, preconditioning: Preconditioning | None = None, given: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read a `.pt` file; only tensors are unpickled.

    Args:
        path: of the file. Where its name begins with "edm", as the released ones' do, the preconditioning is `EDM()`,
            and otherwise `Consistency()`.
        preconditioning: takes the place of these.
        given: fields of UNetConfig, as `openai_config` takes them.

    Raises:
        CheckpointError: the file is truncated, holds other things than tensors, or is another model's.
    """
    weights = read_pickle(path)
    config = openai_config(weights, given, path)
    return Checkpoint(config, weights, preconditioning or _named_scheme(path), {}, str(path))


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a `.pt` file, whole or not at all.

    It holds the weights alone: `left_out` says what must be given where it is loaded.

    Raises:
        ValueError: the preconditioning is not the one that the file's name says (see `read`), or the model has a
            representation, which the file cannot say.
        OSError: the file cannot be written.
    """
    if checkpoint.representation is not None:
        raise ValueError(f"{path}: an OpenAI file cannot say how waveforms are made of samples: take cmfast's format")
    scheme = without_flags(checkpoint.preconditioning)
    if scheme != _named_scheme(path):
        if scheme == schemes.EDM():
            raise ValueError(f"{path}: an OpenAI file of an EDM model has a name that begins with edm")
        if scheme == schemes.Consistency():
            raise ValueError(f"{path}: an OpenAI file whose name begins with edm is an EDM model's; this one is none")
        raise ValueError(
            f"{path}: an OpenAI file cannot say the preconditioning {scheme}: it has that of the released models, "
            "Consistency() or EDM()"
        )
    with whole_file(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({name: value.contiguous() for name, value in checkpoint.weights.items()}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch counts the bytes that a full disk did not take
                raise error.__context__ from None
            raise


def left_out(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments that `cmfast.load` must be given, since a `.pt` file does not hold what they say.

    OpenAI's scripts have flags for these. What is as in the released models is no argument.
    """
    config, scheme = checkpoint.config, checkpoint.preconditioning
    fields: dict[str, Any] = {}
    if config.image_size != _IMAGE_SIZES.get(config.channel_mult):
        fields["image_size"] = config.image_size
    if config.num_head_channels is None:
        fields["num_heads"] = config.num_heads
    elif config.num_head_channels != 64:
        fields["num_head_channels"] = config.num_head_channels
    for name, released in (("dropout", 0.0), ("patch_size", 1)):
        if getattr(config, name) != released:
            fields[name] = getattr(config, name)
    if scheme != without_flags(scheme):
        fields["preconditioning"] = scheme
    return fields


def _named_scheme(path: Path) -> Preconditioning:
    return schemes.EDM() if path.name.startswith("edm") else schemes.Consistency()


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
        if (patch_size := given.get("patch_size", 1)) < 1:
            raise CheckpointError(f"{source}: patch_size must be at least 1, got {patch_size}")
        read = _determined(weights, int(patch_size))
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
        if read["channel_mult"] not in _IMAGE_SIZES:
            raise CheckpointError(
                f"{source}: no released model has channel_mult {read['channel_mult']}: give image_size"
            )
        rest["image_size"] = _IMAGE_SIZES[read["channel_mult"]]
    try:
        return UNetConfig(**{**rest, **read, **given})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _determined(weights: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    """The fields of UNetConfig that follow from the names and shapes of the weights, and its patch_size."""
    first = weights["input_blocks.0.0.weight"]
    patch_area = patch_size ** min(first.ndim - 2, 2)
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
        "in_channels": first.shape[1] // patch_area,
        "out_channels": weights["out.2.weight"].shape[0] // patch_area,
        "model_channels": model_channels,
        "channel_mult": channel_multiples(channels, model_channels),
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

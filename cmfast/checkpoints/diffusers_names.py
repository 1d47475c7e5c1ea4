"""diffusers' names of a UNet2DModel's weights for OpenAI's, and its attention with separate projections."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..unet import UNetConfig
from .checkpoint import CheckpointError

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_{}", "proj_out": "to_out.0"}
_RESAMPLING = {"down": {"op": "conv"}, "up": {"conv": "conv"}}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
#: Where "{}" stands in a name for three tensors, the thirds of OpenAI's one along its rows.
_PROJECTIONS = ("q", "k", "v")


def to_diffusers(config: UNetConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `UNet` under the names and in the shapes of diffusers' UNet2DModel; each value is the same."""
    names = _names(config)
    result: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        other = f"{names[module]}.{leaf}"
        if module.rpartition(".")[2] in ("qkv", "proj_out"):
            value = value.flatten(1) if leaf == "weight" else value
        if "{}" in other:
            result |= {other.format(p): v.clone() for p, v in zip(_PROJECTIONS, value.chunk(3), strict=True)}
        else:
            result[other] = value
    return result


def from_diffusers(
    config: UNetConfig, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The weights of a UNet2DModel under the names and in the shapes of a `UNet`; the inverse of `to_diffusers`.

    Args:
        config: of the network.
        expected: its state_dict, for the names and shapes.
        weights: names and shapes as `to_diffusers` makes them of `expected`.
        source: named in errors.

    Raises:
        CheckpointError: the projections of an attention have different dtypes.
    """
    names, result = _names(config), {}
    for name, like in expected.items():
        module, _, leaf = name.rpartition(".")
        other = f"{names[module]}.{leaf}"
        if "{}" in other:
            parts = [weights[other.format(p)] for p in _PROJECTIONS]
            if len({part.dtype for part in parts}) > 1:
                raise CheckpointError(
                    f"{source}: {other.format('q, k and v')} have different dtypes, which one projection cannot keep"
                )
            value = torch.cat(parts)
        else:
            value = weights[other]
        result[name] = value.reshape(like.shape)
    return result


def _names(config: UNetConfig) -> dict[str, str]:
    """Each module of a `UNet` that has weights, and its name in a UNet2DModel."""
    names = dict(_ENDS)
    for module, other, leaves in _blocks(config):
        names |= {f"{module}.{ours}": f"{other}.{theirs}" for ours, theirs in leaves.items()}
    return names


def _blocks(config: UNetConfig) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(OpenAI's name, diffusers' name, names of the layers) of each block, in the order of `UNet`."""
    levels, attended = len(config.channels), [ds in config.attention_resolutions for ds in config.downsampling]
    k = 1
    for level in range(levels):
        for i in range(config.num_res_blocks):
            yield f"input_blocks.{k}.0", f"down_blocks.{level}.resnets.{i}", _RESNET
            if attended[level]:
                yield f"input_blocks.{k}.1", f"down_blocks.{level}.attentions.{i}", _ATTENTION
            k += 1
        if level + 1 < levels:
            leaves = _RESNET if config.resblock_updown else _RESAMPLING["down"]
            yield f"input_blocks.{k}.0", f"down_blocks.{level}.downsamplers.0", leaves
            k += 1
    yield "middle_block.0", "mid_block.resnets.0", _RESNET
    yield "middle_block.1", "mid_block.attentions.0", _ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", _RESNET
    k = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(config.num_res_blocks + 1):
            yield f"output_blocks.{k}.0", f"up_blocks.{up}.resnets.{i}", _RESNET
            if attended[level]:
                yield f"output_blocks.{k}.1", f"up_blocks.{up}.attentions.{i}", _ATTENTION
            if level > 0 and i == config.num_res_blocks:
                leaves = _RESNET if config.resblock_updown else _RESAMPLING["up"]
                yield f"output_blocks.{k}.{1 + attended[level]}", f"up_blocks.{up}.upsamplers.0", leaves
            k += 1

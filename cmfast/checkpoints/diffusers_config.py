"""What diffusers' configurations say, as cmfast's: UNet2DModel for UNetConfig, a scheduler for a preconditioning.

Both directions, and an error that names all that one of them cannot say.
"""

from collections.abc import Mapping
from typing import Any

from ..preconditioning import Consistency, Preconditioning
from ..unet import NUM_GROUPS, UNetConfig
from .checkpoint import CheckpointError, channel_multiples

NETWORK, SCHEDULER = "UNet2DModel", "CMStochasticIterativeScheduler"

#: Settings of UNet2DModel that `UNet` has fixed, with the value it has, which is also diffusers' default.
_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": NUM_GROUPS,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
#: The other settings with diffusers' defaults.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
#: Blocks without attention, by how they resample; those with attention are AttnDownBlock2D and AttnUpBlock2D.
_PLAIN_BLOCKS = {
    "down": {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet"},
    "up": {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet"},
}
_SCHEDULE = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}


def unet_config(content: Mapping[str, Any], source: str, image_size: int | tuple[int, ...] | None = None) -> UNetConfig:
    """The UNetConfig of a UNet2DModel's configuration.

    Args:
        content: of its config.json.
        source: named in errors.
        image_size: where the configuration has no sample_size.

    Raises:
        CheckpointError: `UNet` has no such network; all that does not fit is named.
        ValueError: no image size, or two.
    """
    size = _image_size(content.get("sample_size"), image_size, source)
    try:
        misfits, fields = _read_settings(content)
        if not misfits:
            return UNetConfig(image_size=size, **fields)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is not a configuration of a UNet2DModel for cmfast: {error}") from error
    raise CheckpointError(
        f"{source}: cmfast.UNet cannot be this UNet2DModel ({'; '.join(misfits)}). "
        "cmfast.accelerate takes any network: load it with diffusers and give it to cmfast.accelerate"
    )


def _read_settings(content: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(what `UNet` cannot be, the fields of UNetConfig without the image size)."""
    misfits = _unknown(content, {**_FIXED, **_DEFAULTS})
    c = {**_FIXED, **_DEFAULTS, **content}
    c["act_fn"] = "silu" if c["act_fn"] == "swish" else c["act_fn"]
    misfits += [f"{name} is {c[name]!r}, not {value!r}" for name, value in _FIXED.items() if c[name] != value]
    channels, head = c["block_out_channels"], c["attention_head_dim"]
    film = c["resnet_time_scale_shift"] == "scale_shift"
    norm_groups = c["attn_norm_num_groups"] or (None if film else c["norm_num_groups"])
    attended, resampling = _levels(c, misfits)
    indivisible = [n for n, a in zip(channels, [*attended[:-1], True], strict=True) if a and head and n % head]
    misfits += [
        reason
        for wrong, reason in (
            (
                c["resnet_time_scale_shift"] not in ("default", "scale_shift"),
                f"resnet_time_scale_shift is {c['resnet_time_scale_shift']!r}, not 'default' or 'scale_shift'",
            ),
            (
                norm_groups != NUM_GROUPS,
                f"attn_norm_num_groups is {c['attn_norm_num_groups']}, which gives the middle block's attention "
                f"{f'{norm_groups} groups' if norm_groups else 'no group norm'}, not {NUM_GROUPS} groups",
            ),
            (
                c["time_embedding_dim"] not in (None, 4 * channels[0]),
                f"time_embedding_dim is {c['time_embedding_dim']}, not {4 * channels[0]}",
            ),
            (
                resampling == "conv" and c["downsample_padding"] != 1,
                f"downsample_padding is {c['downsample_padding']}, not 1",
            ),
            (bool(indivisible), f"attention_head_dim {head} does not divide {indivisible[:1]} channels"),
        )
        if wrong
    ]
    misfits += [
        f"{name} is {c[name]!r}, not a whole number"
        for name in ("in_channels", "out_channels", "layers_per_block", "num_class_embeds")
        if not isinstance(c[name], int) and not (name == "num_class_embeds" and c[name] is None)
    ]
    return misfits, {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "model_channels": channels[0],
        "channel_mult": channel_multiples(channels, channels[0]),
        "num_res_blocks": c["layers_per_block"],
        "attention_resolutions": tuple(2**level for level, a in enumerate(attended) if a),
        "num_head_channels": head,
        "num_classes": c["num_class_embeds"],
        "use_scale_shift_norm": film,
        "resblock_updown": resampling == "resnet",
        "dropout": c["dropout"],
    }


def unet2d_config(config: UNetConfig) -> dict[str, Any]:
    """The configuration of the UNet2DModel that is the same network; the inverse of `unet_config`.

    Raises:
        ValueError: diffusers has no such UNet2DModel; the message says why.
    """
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    heads = {
        config.num_head_channels or channels // config.num_heads
        for ds, channels in zip(config.downsampling, config.channels, strict=True)
        if ds in config.attention_resolutions or ds == config.downsampling[-1]
    }
    one_head = config.num_head_channels is None and config.num_heads == 1
    levels = len(config.channels)
    misfits = [
        reason
        for wrong, reason in (
            (config.dims != 2, f"dims is {config.dims}: it has images only"),
            (config.patch_size != 1, f"patch_size is {config.patch_size}: it has no patches"),
            (
                config.sample_shape[1:] != (size,) * config.dims,
                f"image_size is {config.image_size}: its images are square",
            ),
            (
                config.channels[0] != config.model_channels,
                f"channel_mult begins with {config.channel_mult[0]}: its time embedding is as wide as the first level",
            ),
            (
                levels > 1 and not config.resblock_updown and not config.conv_resample,
                "conv_resample is False: its resampling layers have convolutions",
            ),
            (
                len(heads) > 1 and not one_head,
                f"num_heads is {config.num_heads} at levels of different channels: its heads have one size",
            ),
        )
        if wrong
    ]
    if misfits:
        raise ValueError(f"diffusers has no such UNet2DModel: {'; '.join(misfits)}")
    resnet = config.resblock_updown
    attended = [ds in config.attention_resolutions for ds in config.downsampling]
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    return {
        **_FIXED,
        **_DEFAULTS,
        "sample_size": size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attended)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.num_res_blocks,
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "dropout": config.dropout,
        "attention_head_dim": None if one_head else heads.pop(),
        "attn_norm_num_groups": NUM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }


def preconditioning(content: Mapping[str, Any], source: str) -> Consistency:
    """The preconditioning of a CMStochasticIterativeScheduler's configuration.

    Raises:
        CheckpointError: it is another scheduler's, or adds other noise than consistency sampling.
    """
    if content.get("_class_name") != SCHEDULER:
        raise CheckpointError(
            f"{source} is a {content.get('_class_name')}'s, expected a {SCHEDULER}'s: give a preconditioning to load "
            "the network with it"
        )
    c = {**_SCHEDULE, **content}
    misfits = _unknown(content, _SCHEDULE)
    misfits += [f"{name} is {c[name]!r}, not a number" for name in _SCHEDULE if not isinstance(c[name], int | float)]
    if c["s_noise"] != 1:
        misfits.append(f"s_noise is {c['s_noise']}, not 1")
    if misfits:
        raise CheckpointError(f"{source}: cmfast has no such scheduler ({'; '.join(misfits)}): give a preconditioning")
    try:
        return Consistency(**{name: c[name] for name in _SCHEDULE if name != "s_noise"})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def scheduler_config(scheme: Preconditioning) -> dict[str, Any]:
    """The CMStochasticIterativeScheduler's configuration; the inverse of `preconditioning`.

    Raises:
        ValueError: it is not a consistency model's preconditioning.
    """
    if type(scheme) is not Consistency:
        raise ValueError(
            f"a diffusers pipeline cannot say the preconditioning {scheme}: its {SCHEDULER} has Consistency's alone"
        )
    return {name: getattr(scheme, name, default) for name, default in _SCHEDULE.items()}


def _unknown(content: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Settings that are set and that nobody here knows: what they change would be lost."""
    return [
        f"{name} is {value!r}, which cmfast does not know"
        for name, value in content.items()
        if not name.startswith("_") and name not in known and value not in (None, False)
    ]


def _image_size(own: Any, given: int | tuple[int, ...] | None, source: str) -> int | tuple[int, ...]:
    if own is None and given is None:
        raise ValueError(f"{source} has no sample_size: give image_size")
    if own is not None and given is not None:
        raise ValueError(f"{source} has sample_size {own}: image_size cannot be given")
    size: Any = given if own is None else own
    lengths = (size, size) if isinstance(size, int) else tuple(size)
    if len(lengths) != 2 or not all(isinstance(length, int) for length in lengths):
        raise CheckpointError(f"{source}: sample_size is {size!r}, not one or two whole numbers")
    return lengths[0] if lengths[0] == lengths[1] else lengths


def _levels(c: Mapping[str, Any], misfits: list[str]) -> tuple[list[bool], str | None]:
    """(which levels have attention, how all of them resample), or what does not fit among the misfits."""
    down, up = ([name.removeprefix("UNetRes") for name in c[f"{way}_block_types"]] for way in ("down", "up"))
    levels = len(c["block_out_channels"])
    if not levels == len(down) == len(up):
        misfits.append(f"{levels} block_out_channels, {len(down)} down_block_types and {len(up)} up_block_types")
        return [False] * levels, None
    kinds = set()
    for way, blocks in (("down", down), ("up", up)):
        attention, plain = f"Attn{way.capitalize()}Block2D", _PLAIN_BLOCKS[way]
        misfits += [
            f"{way}_block_types has {name}, not {attention} or {' or '.join(plain)}"
            for name in dict.fromkeys(blocks)
            if name != attention and name not in plain
        ]
        resampling = c[f"{way}sample_type"] or "conv"
        kinds |= {resampling if name == attention else plain.get(name, resampling) for name in blocks[:-1]}
    attended = [name == "AttnDownBlock2D" for name in down]
    if [name == "AttnUpBlock2D" for name in reversed(up)] != attended:
        misfits.append("up_block_types does not mirror down_block_types: other levels have attention")
    if len(kinds) > 1 or not kinds <= {"conv", "resnet"}:
        misfits.append(
            f"its levels resample by {' and '.join(sorted(map(str, kinds)))}, not all by conv or all by resnet"
        )
    return attended, next(iter(kinds), None)

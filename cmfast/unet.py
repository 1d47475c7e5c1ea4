"""The U-Net of the released diffusion and consistency models, over the fused operators.

The names of the parameters are those of OpenAI's checkpoints (guided-diffusion, consistency_models), so their
state_dicts load as they are. Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import attention, group_norm, split_qkv
from .pooling import average_pool

#: Groups of every group norm of these networks; divides every number of channels.
NUM_GROUPS = 32


#: The fields of a `UNetConfig` that count something.
_COUNTS = (
    "in_channels",
    "out_channels",
    "model_channels",
    "num_res_blocks",
    "num_heads",
    "num_head_channels",
    "num_classes",
    "patch_size",
)
#: Those that say whether the network has something.
_SWITCHES = ("use_scale_shift_norm", "resblock_updown", "conv_resample")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `UNet`.

    Attributes:
        image_size: length of each spatial dimension of a sample, or one length a dimension. The network is fully
            convolutional: it takes any size that patch_size · 2^(len(channel_mult) - 1) divides, and videos of any
            depth; this is the one it was trained on.
        in_channels: channels of a sample.
        out_channels: channels of the network's output.
        model_channels: channels at the finest level times channel_mult[0]; a multiple of 32.
        channel_mult: channels of each level, in units of model_channels; one level more halves the resolution.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, …) at which blocks are followed by self-attention.
        num_heads: heads of each attention where num_head_channels is None.
        num_head_channels: channels of a head; the number of heads follows from it.
        num_classes: size of the class embedding; None for an unconditional network.
        use_scale_shift_norm: the timestep embedding acts as FiLM on the second group norm; otherwise it is added.
        resblock_updown: resample inside residual blocks; otherwise by separate layers.
        conv_resample: separate resampling layers have a convolution.
        dropout: probability, in training mode only.
        dims: 1 (audio), 2 (images) or 3 (video, whose first spatial dimension is never resampled).
        patch_size: the finest level has a position for each patch of so many samples a side, folded into channels by
            the first convolution's input and unfolded after the last; a video's patches are of one frame. The
            downsampling factors count from there. Luhman and Luhman 2022, "Improving Diffusion Model Efficiency
            Through Patching".

    Raises:
        ValueError: a size that is none, or sizes that do not fit together.
    """

    image_size: int | tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    num_heads: int = 1
    num_head_channels: int | None = None
    num_classes: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    dropout: float = 0.0
    dims: int = 2
    patch_size: int = 1

    def __post_init__(self) -> None:
        lists = {"channel_mult": "a list of numbers", "attention_resolutions": "a list of numbers"}
        if not isinstance(self.image_size, int):
            lists["image_size"] = "a whole number, or one a dimension"
        for field, expected in lists.items():
            value = getattr(self, field)
            if not isinstance(value, Iterable):
                raise ValueError(f"UNetConfig: {field} must be {expected}, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        for field in _COUNTS:
            value = getattr(self, field)
            is_count = isinstance(value, int) and value >= 1
            if not is_count and not (value is None and field in ("num_head_channels", "num_classes")):
                raise ValueError(f"UNetConfig: {field} must be a whole number of at least 1, got {value!r}")
        for field in _SWITCHES:
            if getattr(self, field) not in (True, False):
                raise ValueError(f"UNetConfig: {field} must be True or False, got {getattr(self, field)!r}")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig: dropout must be at least 0 and below 1, got {self.dropout!r}")
        if not isinstance(self.dims, int) or self.dims not in (1, 2, 3):
            raise ValueError(f"UNetConfig: dims must be 1, 2 or 3, got {self.dims!r}")
        if not isinstance(self.image_size, int) and len(self.image_size) != self.dims:
            raise ValueError(f"UNetConfig: image_size must have {self.dims} lengths, got {self.image_size}")
        are_numbers = all(isinstance(mult, int | float) and 0.0 < mult < math.inf for mult in self.channel_mult)
        if not self.channel_mult or not are_numbers or any(c % NUM_GROUPS or c < 1 for c in self.channels):
            raise ValueError(
                f"UNetConfig: every level needs a multiple of {NUM_GROUPS} channels, got "
                f"model_channels {self.model_channels} x channel_mult {self.channel_mult}"
            )
        lengths, factor = self.sample_shape[1:], self.patch_size * self.downsampling[-1]
        if not all(isinstance(length, int) and length >= 1 for length in lengths):
            raise ValueError(f"UNetConfig: image_size must be whole numbers of at least 1, got {self.image_size}")
        if any(length % factor for length in lengths[-2:]):
            raise ValueError(
                f"UNetConfig: {len(self.channel_mult)} levels need lengths that are multiples of {factor}, "
                f"patch_size · 2^(levels - 1), and image_size is {self.image_size}"
            )
        if others := [ds for ds in self.attention_resolutions if ds not in self.downsampling]:
            raise ValueError(
                f"UNetConfig: attention_resolutions are downsampling factors of the levels, {self.downsampling}, got "
                f"{', '.join(map(str, others))}"
            )
        per_head = self.num_head_channels
        for ds, channels in zip(self.downsampling, self.channels, strict=True):
            # The middle block, at the last factor, always attends.
            attends = ds in self.attention_resolutions or ds == self.downsampling[-1]
            if attends and channels % (self.num_heads if per_head is None else per_head):
                heads = f"num_heads {self.num_heads}" if per_head is None else f"num_head_channels {per_head}"
                raise ValueError(
                    f"UNetConfig: the heads must divide the {channels} channels at factor {ds}, got {heads}"
                )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Downsampling factor of each level: 1, 2, 4, …"""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def patch_area(self) -> int:
        """Samples of a channel in a patch: what `patch_size` multiplies the channels by."""
        return self.patch_size ** min(self.dims, 2)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape [C, *spatial] of one sample."""
        spatial = (self.image_size,) * self.dims if isinstance(self.image_size, int) else self.image_size
        return (self.in_channels, *spatial)

    @classmethod
    def imagenet64(cls) -> "UNetConfig":
        """The released ImageNet 64×64 networks (EDM, CD, CT): 295,899,267 parameters."""
        return cls(
            image_size=64,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(2, 4, 8),
            num_head_channels=64,
            num_classes=1000,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )

    @classmethod
    def lsun256(cls) -> "UNetConfig":
        """The released LSUN 256×256 networks (bedroom, cat; EDM, CD, CT): 526,304,771 parameters."""
        return cls(
            image_size=256,
            model_channels=256,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(8, 16, 32),
            num_head_channels=64,
            use_scale_shift_norm=False,
            resblock_updown=True,
        )


class UNet(nn.Module):
    """The network F(x, t, class): a residual U-Net with self-attention at chosen resolutions."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        emb_channels = 4 * c.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(c.model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if c.num_classes is not None:
            self.label_emb = _embedding(c.num_classes, emb_channels)

        def level(ds: int, in_channels: int, out_channels: int) -> list[nn.Module]:
            attend = [AttentionBlock(c, out_channels)] if ds in c.attention_resolutions else []
            return [ResBlock(c, in_channels, out_channels), *attend]

        def resample(channels: int, direction: str) -> nn.Module:
            if c.resblock_updown:
                return ResBlock(c, channels, channels, direction)
            return (Upsample if direction == "up" else Downsample)(c, channels)

        channels = c.channels[0]
        self.input_blocks = nn.ModuleList([Block(_conv(c.dims, c.in_channels * c.patch_area, channels, 3))])
        skips = [channels]
        for ds, out_channels in zip(c.downsampling, c.channels, strict=True):
            for _ in range(c.num_res_blocks):
                self.input_blocks.append(Block(*level(ds, channels, out_channels)))
                channels = out_channels
                skips.append(channels)
            if ds != c.downsampling[-1]:
                self.input_blocks.append(Block(resample(channels, "down")))
                skips.append(channels)
        self.middle_block = Block(
            ResBlock(c, channels, channels), AttentionBlock(c, channels), ResBlock(c, channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for ds, out_channels in reversed(list(zip(c.downsampling, c.channels, strict=True))):
            for i in range(c.num_res_blocks + 1):
                layers = level(ds, channels + skips.pop(), out_channels)
                channels = out_channels
                if ds != 1 and i == c.num_res_blocks:
                    layers.append(resample(channels, "up"))
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels),
            nn.SiLU(),
            _zero(_conv(c.dims, channels, c.out_channels * c.patch_area, 3)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: [N, in_channels, *spatial], in the dtype of the parameters.
            timesteps: [N], any floating dtype; the network's time, for the released models 250·ln(sigma).
            class_labels: [N] integers below num_classes; None for an unconditional network.

        Returns:
            [N, out_channels, *spatial].

        Raises:
            ValueError: an input of the wrong size, or class labels missing or not wanted.
        """
        self._check(x, timesteps, class_labels)
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        if class_labels is not None:
            emb = emb + self.label_emb(class_labels)
        emb = F.silu(emb)  # every block's emb_layers begin with it
        h, skips = fold_patches(x, self.config.patch_size), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(h, emb, skips.pop())
        norm, _, conv = self.out
        return unfold_patches(conv(_norm(norm, h, activation="silu")), self.config.patch_size)

    def _check(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> None:
        c, factor = self.config, self.config.downsampling[-1] * self.config.patch_size
        resampled = x.shape[-min(c.dims, 2) :]
        if x.ndim != c.dims + 2 or x.shape[1] != c.in_channels or any(length % factor for length in resampled):
            raise ValueError(
                f"UNet: expected x [N, {c.in_channels}, {', '.join('DHW'[-c.dims :])}] with resampled lengths that are "
                f"multiples of {factor}, got {list(x.shape)}"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"UNet: expected timesteps [{x.shape[0]}], got {list(timesteps.shape)}")
        if (class_labels is None) != (c.num_classes is None):
            wanted = "no class_labels" if c.num_classes is None else f"class_labels [N] below {c.num_classes}"
            raise ValueError(f"UNet: expected {wanted}, got {'none' if class_labels is None else 'some'}")
        if class_labels is not None and class_labels.shape != x.shape[:1]:
            raise ValueError(f"UNet: expected class_labels [{x.shape[0]}], got {list(class_labels.shape)}")


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids [N, dim] of the times [N], float32 or wider: dim/2 cosines, then dim/2 sines, of frequencies 1 to 10⁻⁴.

    Vaswani et al. 2017, section 3.5, in the order of OpenAI's networks; an odd dim ends in a zero.
    """
    dtype = torch.float64 if timesteps.dtype == torch.float64 else torch.float32
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=dtype, device=timesteps.device))
    angles = timesteps.to(dtype)[:, None] * frequencies
    sinusoids = torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
    return F.pad(sinusoids, (0, 1)) if dim % 2 else sinusoids


def _embedding(count: int, channels: int) -> nn.Embedding:
    """An embedding; of one on the meta device, torch would import its compiler to draw no numbers."""
    weight = torch.empty(count, channels)
    return nn.Embedding(count, channels, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class Block(nn.Sequential):
    """Layers in sequence: residual blocks take the embedding too, and the first layer the skip connection."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Map x [N, C, *spatial] with the activated embedding [N, E] and further channels `skip` of the first layer."""
        for layer in self:
            x, skip = layer(x, emb, skip) if isinstance(layer, ResBlock) else layer(x), None
        return x


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, the embedding, norm, SiLU, convolution; added to the input. It may resample by 2."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, direction: str | None = None) -> None:
        super().__init__()
        dims, film = config.dims, config.use_scale_shift_norm
        self.film, self.direction = film, direction
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, in_channels), nn.SiLU(), _conv(dims, in_channels, out_channels, 3)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * config.model_channels, 2 * out_channels if film else out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            _zero(_conv(dims, out_channels, out_channels, 3)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else _conv(dims, in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map x [N, C, *spatial] (with `skip` as further channels) and the activated embedding [N, E]."""
        norm, _, conv = self.in_layers
        h = _norm(norm, x if skip is None else (x, skip), activation="silu")
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        if self.direction is not None:
            resample = upsample if self.direction == "up" else downsample
            h, x = resample(h), resample(x)
        h = conv(h)
        projected = self.emb_layers[1](emb)
        norm, _, dropout, conv = self.out_layers
        if self.film:
            scale, shift = projected.chunk(2, dim=1)
            h = _norm(norm, h, scale=scale, shift=shift, activation="silu")
        else:
            h = _norm(norm, h, add=projected, activation="silu")
        return self.skip_connection(x) + conv(dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, added to the input."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.num_heads = channels // config.num_head_channels if config.num_head_channels else config.num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = _conv(config.dims, channels, 3 * channels, 1)
        self.proj_out = _zero(_conv(config.dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, C, *spatial]."""
        qkv = self.qkv(_norm(self.norm, x)).flatten(2)
        h = attention(*split_qkv(qkv, self.num_heads, "3hd", channels_dim=1))
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution where the configuration has conv_resample."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = _conv(config.dims, channels, channels, 3) if config.conv_resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, C, *spatial] to twice the resolution."""
        return self.conv(upsample(x))


class Downsample(nn.Module):
    """Downsampling by 2: a strided convolution where the configuration has conv_resample, or average pooling."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        stride = (1, 2, 2) if config.dims == 3 else 2
        self.op = _conv(config.dims, channels, channels, 3, stride) if config.conv_resample else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, C, *spatial] to half the resolution."""
        return downsample(x) if self.op is None else self.op(x)


def upsample(x: Tensor) -> Tensor:
    """Repeat each position of x [N, C, *spatial] twice along every spatial dimension (not along a video's time)."""
    larger = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0) if x.ndim == 5 else 2.0, mode="nearest")
    return larger.to(x.dtype)  # autocast takes some of these in float32


def downsample(x: Tensor) -> Tensor:
    """Average x [N, C, *spatial] over pairs along every spatial dimension (not along a video's time)."""
    return average_pool(x, (1, 2, 2) if x.ndim == 5 else 2)


def fold_patches(x: Tensor, size: int) -> Tensor:
    """Patches of x [N, C, *spatial] as channels: [N, C · size^k, *spatial / size], of a video's frames by themselves.

    k is the number of dimensions that are divided, at most 2. Channel c · size^k + j has value j of each patch of
    channel c, in row-major order; for images this is torch's pixel_unshuffle.
    """
    if size == 1:
        return x
    lead, divided = _split(x)
    k = len(divided)
    x = x.reshape(*lead, *(part for length in divided for part in (length // size, size)))
    positions, inside = (range(len(lead) + i, x.ndim, 2) for i in (0, 1))
    return x.permute(0, 1, *inside, *range(2, len(lead)), *positions).flatten(1, 1 + k)


def unfold_patches(x: Tensor, size: int) -> Tensor:
    """The inverse of `fold_patches`: x [N, C · size^k, *spatial / size] as [N, C, *spatial]."""
    if size == 1:
        return x
    lead, divided = _split(x)
    k, (n, channels, *frames) = len(divided), lead
    x = x.reshape(n, channels // size**k, *(size,) * k, *frames, *divided)
    after = 2 + k + len(frames)  # where the positions begin
    interleaved = (d for i in range(k) for d in (after + i, 2 + i))
    x = x.permute(0, 1, *range(2 + k, after), *interleaved)
    return x.reshape(n, channels // size**k, *frames, *(length * size for length in divided))


def _split(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of x [N, C, *spatial] up to the dimensions that are resampled, and these."""
    first = x.ndim - min(x.ndim - 2, 2)
    return tuple(x.shape[:first]), tuple(x.shape[first:])


def _norm(norm: nn.Module, x: Tensor | tuple[Tensor, Tensor], **fused: Any) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **fused)


def _conv(dims: int, in_channels: int, out_channels: int, kernel: int, stride: int | tuple[int, ...] = 1) -> nn.Module:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return conv(in_channels, out_channels, kernel, stride, kernel // 2)


def _zero(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

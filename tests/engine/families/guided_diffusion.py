"""The network of guided-diffusion, written anew in few lines: it calls of torch what that calls, in the same order."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def normalization(channels):
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps, dim, max_period=10000):
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies.to(device=timesteps.device)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepBlock(nn.Module):
    pass


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels, use_conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def downsample(channels, use_conv):
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2, 2)


class ResBlock(TimestepBlock):
    def __init__(self, channels, emb_channels, out_channels, use_scale_shift_norm, up=False, down=False):
        super().__init__()
        self.use_scale_shift_norm, self.updown = use_scale_shift_norm, up or down
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        h_and_x = [Upsample(channels, False) if up else downsample(channels, False) for _ in range(2)]
        self.h_upd, self.x_upd = h_and_x if self.updown else (nn.Identity(), nn.Identity())
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        if self.updown:
            h = self.h_upd(self.in_layers[:-1](x))
            x = self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


def legacy_attention(qkv, heads):
    """The packed order [heads, 3, channels]."""
    n, width, length = qkv.shape
    channels = width // (3 * heads)
    q, k, v = qkv.reshape(n * heads, channels * 3, length).split(channels, dim=1)
    scale = 1 / math.sqrt(math.sqrt(channels))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


def new_attention(qkv, heads):
    """The packed order [3, heads, channels]."""
    n, width, length = qkv.shape
    channels = width // (3 * heads)
    q, k, v = qkv.chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(channels))
    q, k = ((x * scale).view(n * heads, channels, length) for x in (q, k))
    weight = torch.einsum("bct,bcs->bts", q, k)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v.reshape(n * heads, channels, length)).reshape(n, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.attention = heads, new_attention if new_order else legacy_attention
        self.norm, self.qkv = normalization(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        n, channels, *spatial = x.shape
        x = x.reshape(n, channels, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x)), self.heads))
        return (x + h).reshape(n, channels, *spatial)


class UNetModel(nn.Module):
    def __init__(self, width=32, mults=(1, 2), attention=(2,), heads=2, film=True, updown=True, new_order=True):
        super().__init__()
        self.width = width
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        channels, below, factor = width * mults[0], [width * mults[0]], 1
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(3, channels, 3, padding=1))])
        for level, mult in enumerate(mults):
            layers = [ResBlock(channels, emb, mult * width, film)]
            channels = mult * width
            if factor in attention:
                layers.append(AttentionBlock(channels, heads, new_order))
            self.input_blocks.append(TimestepEmbedSequential(*layers))
            below.append(channels)
            if level < len(mults) - 1:
                down = ResBlock(channels, emb, channels, film, down=True) if updown else downsample(channels, True)
                self.input_blocks.append(TimestepEmbedSequential(down))
                below.append(channels)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            ResBlock(channels, emb, channels, film),
            AttentionBlock(channels, heads, new_order),
            ResBlock(channels, emb, channels, film),
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed([*enumerate(mults)]):
            for i in range(2):
                layers = [ResBlock(channels + below.pop(), emb, width * mult, film)]
                channels = width * mult
                if factor in attention:
                    layers.append(AttentionBlock(channels, heads, new_order))
                if level and i == 1:
                    up = ResBlock(channels, emb, channels, film, up=True) if updown else Upsample(channels, True)
                    layers.append(up)
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        below, h = [], x
        for block in self.input_blocks:
            h = block(h, emb)
            below.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, below.pop()], dim=1), emb)
        return self.out(h)

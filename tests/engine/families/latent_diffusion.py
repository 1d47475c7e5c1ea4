"""The networks of CompVis' latent diffusion that are DDPM's, written anew in few lines: a UNet and an autoencoder.

They call of torch what ldm/modules/diffusionmodules/model.py of https://github.com/CompVis/latent-diffusion calls (MIT
licence, Copyright 2022 Machine Vision and Learning Group, LMU Munich).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def timestep_embedding(timesteps, embedding_dim):
    half_dim = embedding_dim // 2
    emb = math.log(10000) / (half_dim - 1)
    emb = torch.exp(torch.arange(half_dim, dtype=torch.float32) * -emb)
    emb = emb.to(device=timesteps.device)
    emb = timesteps.float()[:, None] * emb[None, :]
    return torch.cat([torch.sin(emb), torch.cos(emb)], dim=1)


def nonlinearity(x):
    return x * torch.sigmoid(x)


def normalize(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels, with_conv=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x):
        if self.conv is None:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class ResnetBlock(nn.Module):
    def __init__(self, channels, out, temb_channels=0, conv_shortcut=False):
        super().__init__()
        self.norm1, self.conv1 = normalize(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out) if temb_channels else None
        self.norm2, self.dropout, self.conv2 = normalize(out), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        shortcut = {"kernel_size": 3, "padding": 1} if conv_shortcut else {"kernel_size": 1}
        self.shortcut = nn.Conv2d(channels, out, **shortcut) if channels != out else None

    def forward(self, x, temb):
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = normalize(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w)
        q = q.permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.bmm(q, k)
        w_ = w_ * (int(c) ** (-0.5))
        w_ = F.softmax(w_, dim=2)
        v = v.reshape(b, c, h * w)
        w_ = w_.permute(0, 2, 1)
        h_ = torch.bmm(v, w_)
        return x + self.proj_out(h_.reshape(b, c, h, w))


class Middle(nn.Module):
    def __init__(self, channels, temb_channels=0):
        super().__init__()
        self.block_1, self.block_2 = (ResnetBlock(channels, channels, temb_channels) for _ in range(2))
        self.attn_1 = AttnBlock(channels)

    def forward(self, h, temb=None):
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class Model(nn.Module):
    """DDPM's UNet, with one block a level."""

    def __init__(self, ch=32, mults=(1, 2), attention=(1,), conv_shortcut=False, resamp_with_conv=True):
        super().__init__()
        self.ch = ch
        temb = 4 * ch
        self.temb = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, below = ch, [ch]
        for i, mult in enumerate(mults):
            block = ResnetBlock(channels, mult * ch, temb, conv_shortcut)
            channels = mult * ch
            below.append(channels)
            attn = AttnBlock(channels) if i in attention else nn.Identity()
            self.down.append(nn.ModuleList([block, attn]))
            if i < len(mults) - 1:
                self.down[-1].append(Downsample(channels, resamp_with_conv))
                below.append(channels)
        self.mid = Middle(channels, temb)
        for i, mult in reversed([*enumerate(mults)]):
            layers = nn.ModuleList()
            for _ in range(2):
                layers.append(ResnetBlock(channels + below.pop(), mult * ch, temb, conv_shortcut))
                channels = mult * ch
                layers.append(AttnBlock(channels) if i in attention else nn.Identity())
            if i:
                layers.append(Upsample(channels))
            self.up.append(layers)
        self.norm_out, self.conv_out = normalize(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x, t):
        temb = self.temb[0](timestep_embedding(t, self.ch))
        temb = self.temb[1](nonlinearity(temb))
        hs = [self.conv_in(x)]
        for block, attn, *down in self.down:
            hs.append(attn(block(hs[-1], temb)))
            for layer in down:
                hs.append(layer(hs[-1]))
        h = self.mid(hs[-1], temb)
        for first, attn_1, second, attn_2, *up in self.up:
            h = attn_1(first(torch.cat([h, hs.pop()], dim=1), temb))
            h = attn_2(second(torch.cat([h, hs.pop()], dim=1), temb))
            for layer in up:
                h = layer(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Encoder(nn.Module):
    def __init__(self, ch=32, z_channels=4):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.first, self.down, self.second = ResnetBlock(ch, ch), Downsample(ch), ResnetBlock(ch, 2 * ch)
        self.mid, self.norm_out = Middle(2 * ch), normalize(2 * ch)
        self.conv_out, self.quant_conv = nn.Conv2d(2 * ch, 2 * z_channels, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        h = self.down(self.first(self.conv_in(x), None))
        h = self.mid(self.second(h, None))
        return self.quant_conv(self.conv_out(nonlinearity(self.norm_out(h))))


class Decoder(nn.Module):
    def __init__(self, ch=32, z_channels=4):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.conv_in, self.mid = nn.Conv2d(z_channels, 2 * ch, 3, padding=1), Middle(2 * ch)
        self.first, self.up, self.second = ResnetBlock(2 * ch, 2 * ch), Upsample(2 * ch), ResnetBlock(2 * ch, ch)
        self.norm_out, self.conv_out = normalize(ch), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(self.post_quant_conv(z)))
        h = self.second(self.up(self.first(h, None)), None)
        return torch.tanh(self.conv_out(nonlinearity(self.norm_out(h))))

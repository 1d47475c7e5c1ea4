"""The ImageDenoiserModelV1 of k-diffusion 0.1.1, written anew in few lines: it calls of torch what that calls.

Its source is https://github.com/crowsonkb/k-diffusion (MIT licence, Copyright 2022 Katherine Crowson).
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F


def append_dims(x, target_dims):
    return x[(..., *(None,) * (target_dims - x.ndim))]


class ConditionedModule(nn.Module):
    pass


class ConditionedSequential(nn.Sequential, ConditionedModule):
    def forward(self, x, cond):
        for module in self:
            x = module(x, cond) if isinstance(module, ConditionedModule) else module(x)
        return x


class AdaGN(ConditionedModule):
    def __init__(self, feats_in, c_out, num_groups):
        super().__init__()
        self.num_groups, self.mapper = num_groups, nn.Linear(feats_in, c_out * 2)

    def forward(self, x, cond):
        weight, bias = self.mapper(cond["cond"]).chunk(2, dim=-1)
        x = F.group_norm(x, self.num_groups, eps=1e-5)
        return torch.addcmul(append_dims(bias, x.ndim), x, append_dims(weight, x.ndim) + 1)


class ResConvBlock(ConditionedModule):
    def __init__(self, feats_in, c_in, c_mid, c_out, group_size):
        super().__init__()
        self.main = ConditionedSequential(
            AdaGN(feats_in, c_in, max(1, c_in // group_size)),
            nn.GELU(),
            nn.Conv2d(c_in, c_mid, 3, padding=1),
            nn.Dropout2d(0.1, inplace=True),
            AdaGN(feats_in, c_mid, max(1, c_mid // group_size)),
            nn.GELU(),
            nn.Conv2d(c_mid, c_out, 3, padding=1),
            nn.Dropout2d(0.1, inplace=True),
        )
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x, cond):
        skip = self.skip(x)
        return self.main(x, cond) + skip


class SelfAttention2d(ConditionedModule):
    def __init__(self, c_in, n_head, norm):
        super().__init__()
        self.norm_in, self.n_head = norm(c_in), n_head
        self.qkv_proj, self.out_proj = nn.Conv2d(c_in, c_in * 3, 1), nn.Conv2d(c_in, c_in, 1)

    def forward(self, x, cond):
        n, c, h, w = x.shape
        qkv = self.qkv_proj(self.norm_in(x, cond))
        qkv = qkv.view([n, self.n_head * 3, c // self.n_head, h * w]).transpose(2, 3)
        q, k, v = qkv.chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        y = y.transpose(2, 3).contiguous().view([n, c, h, w])
        return x + self.out_proj(y)


class CrossAttention2d(ConditionedModule):
    def __init__(self, c_dec, c_enc, n_head, norm):
        super().__init__()
        self.norm_enc, self.norm_dec, self.n_head = nn.LayerNorm(c_enc), norm(c_dec), n_head
        self.q_proj, self.kv_proj = nn.Conv2d(c_dec, c_dec, 1), nn.Linear(c_enc, c_dec * 2)
        self.out_proj = nn.Conv2d(c_dec, c_dec, 1)

    def forward(self, x, cond):
        n, c, h, w = x.shape
        q = self.q_proj(self.norm_dec(x, cond))
        q = q.view([n, self.n_head, c // self.n_head, h * w]).transpose(2, 3)
        kv = self.kv_proj(self.norm_enc(cond["cross"]))
        kv = kv.view([n, -1, self.n_head * 2, c // self.n_head]).transpose(1, 2)
        k, v = kv.chunk(2, dim=1)
        attn_mask = (cond["cross_padding"][:, None, None, :]) * -10000
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=0.0)
        y = y.transpose(2, 3).contiguous().view([n, c, h, w])
        return x + self.out_proj(y)


class Resample2d(nn.Module):
    """By a factor of 2: its weights are written to zeros at every call."""

    def __init__(self, factor):
        super().__init__()
        kernel_1d = torch.tensor([[1 / 8, 3 / 8, 3 / 8, 1 / 8]]) * factor
        self.register_buffer("kernel", kernel_1d.T @ kernel_1d)

    def weight(self, x):
        weight = x.new_zeros([x.shape[1], x.shape[1], self.kernel.shape[0], self.kernel.shape[1]])
        indices = torch.arange(x.shape[1], device=x.device)
        weight[indices, indices] = self.kernel.to(weight)
        return weight


class Downsample2d(Resample2d):
    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        return F.conv2d(x, self.weight(x), stride=2)


class Upsample2d(Resample2d):
    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        return F.conv_transpose2d(x, self.weight(x), stride=2, padding=3)


class FourierFeatures(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.register_buffer("weight", torch.randn([out_features // 2, in_features]))

    def forward(self, x):
        f = 2 * math.pi * x @ self.weight.T
        return torch.cat([f.cos(), f.sin()], dim=-1)


def layers(n_layers, feats_in, c_in, c_mid, c_out, self_attn, c_enc, group_size, head_size):
    for i in range(n_layers):
        width = c_mid if i < n_layers - 1 else c_out
        yield ResConvBlock(feats_in, c_mid if i else c_in, c_mid, width, group_size)
        norm = functools.partial(AdaGN, feats_in, num_groups=max(1, width // group_size))
        heads = max(1, width // head_size)
        if self_attn:
            yield SelfAttention2d(width, heads, norm)
        if c_enc:
            yield CrossAttention2d(width, c_enc, heads, norm)


class UNet(ConditionedModule):
    def __init__(self, d_blocks, u_blocks, skip_stages):
        super().__init__()
        self.d_blocks, self.u_blocks, self.skip_stages = nn.ModuleList(d_blocks), nn.ModuleList(u_blocks), skip_stages

    def forward(self, x, cond):
        skips = []
        for block in self.d_blocks[self.skip_stages :]:
            x = block(x, cond)
            skips.append(x)
        for i, (block, skip) in enumerate(zip(self.u_blocks, reversed(skips), strict=False)):
            x = block(torch.cat([x, skip], dim=1) if i else x, cond)
        return x


class ImageDenoiserModelV1(nn.Module):
    def __init__(
        self,
        channels=(16, 32),
        self_attn_depths=(False, True),
        cross_cond_dim=0,
        mapping_cond_dim=0,
        unet_cond_dim=0,
        patch_size=1,
        skip_stages=0,
        has_variance=False,
        feats_in=24,
        depths=(1, 2),
        c_in=3,
        group_size=8,
        head_size=16,
    ):
        super().__init__()
        self.patch_size, self.has_variance = patch_size, has_variance
        self.timestep_embed = FourierFeatures(1, feats_in)
        if mapping_cond_dim:
            self.mapping_cond = nn.Linear(mapping_cond_dim, feats_in, bias=False)
        linears = nn.Linear(feats_in, feats_in), nn.GELU(), nn.Linear(feats_in, feats_in), nn.GELU()
        self.mapping = nn.Sequential(*linears)
        outer, patch = channels[max(0, skip_stages - 1)], patch_size**2
        self.proj_in = nn.Conv2d((c_in + unet_cond_dim) * patch, outer, 1)
        self.proj_out = nn.Conv2d(outer, c_in * patch + has_variance, 1)
        d_blocks, u_blocks = [], []
        for i, (depth, width, attention) in enumerate(zip(depths, channels, self_attn_depths, strict=True)):
            below, apart = channels[max(0, i - 1)], i > skip_stages
            rest = attention, cross_cond_dim, group_size, head_size
            down = layers(depth, feats_in, below, width, width, *rest)
            up = layers(depth, feats_in, width * 2 if i < len(depths) - 1 else width, width, below, *rest)
            d_blocks.append(ConditionedSequential(Downsample2d() if apart else nn.Identity(), *down))
            u_blocks.append(ConditionedSequential(*up, Upsample2d() if apart else nn.Identity()))
        self.u_net = UNet(d_blocks, reversed(u_blocks), skip_stages)

    def forward(
        self,
        x,
        sigma,
        mapping_cond=None,
        unet_cond=None,
        cross_cond=None,
        cross_cond_padding=None,
        return_variance=False,
    ):
        c_noise = sigma.log() / 4
        timestep_embed = self.timestep_embed(append_dims(c_noise, 2))
        mapped = torch.zeros_like(timestep_embed) if mapping_cond is None else self.mapping_cond(mapping_cond)
        cond = {"cond": self.mapping(timestep_embed + mapped)}
        if unet_cond is not None:
            x = torch.cat([x, unet_cond], dim=1)
        if cross_cond is not None:
            cond |= {"cross": cross_cond, "cross_padding": cross_cond_padding}
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        x = self.proj_out(self.u_net(self.proj_in(x), cond))
        if self.has_variance:
            x, logvar = x[:, :-1], x[:, -1].flatten(1).mean(1)
        if self.patch_size > 1:
            x = F.pixel_shuffle(x, self.patch_size)
        return (x, logvar) if self.has_variance and return_variance else x

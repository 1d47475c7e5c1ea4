"""The Unet of denoising-diffusion-pytorch 2.3.4, written anew in few lines: it calls of torch what that calls.

Its source is https://github.com/lucidrains/denoising-diffusion-pytorch (MIT licence, Copyright 2020 Phil Wang). What it
asks of einops is spelled as the reshape, permute and expand that einops makes of it.
"""

import math

import torch
from torch import einsum, nn
from torch.nn import functional as F


def upsample(dim, dim_out):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim_out, 3, padding=1))


class Rearrange(nn.Module):
    """The layer of einops: b c (h p1) (w p2) -> b (c p1 p2) h w, both of 2."""

    def forward(self, x):
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def downsample(dim, dim_out):
    return nn.Sequential(Rearrange(), nn.Conv2d(dim * 4, dim_out, 1))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * self.scale


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim, theta=10000):
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, x):
        half_dim = self.dim // 2
        emb = math.log(self.theta) / (half_dim - 1)
        emb = torch.exp(torch.arange(half_dim, device=x.device) * -emb)
        emb = x[:, None] * emb[None, :]
        return torch.cat((emb.sin(), emb.cos()), dim=-1)


class LearnedSinusoidalPosEmb(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, x):
        x = x.reshape(-1, 1)
        freqs = x * self.weights.reshape(1, -1) * 2 * math.pi
        fouriered = torch.cat((freqs.sin(), freqs.cos()), dim=-1)
        return torch.cat((x, fouriered), dim=-1)


class Block(nn.Module):
    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm, self.act, self.dropout = RMSNorm(dim_out), nn.SiLU(), nn.Dropout(0.1)

    def forward(self, x, scale_shift=None):
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))


class ResnetBlock(nn.Module):
    def __init__(self, dim, dim_out, time_emb_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x, time_emb):
        time_emb = self.mlp(time_emb)
        time_emb = time_emb.reshape(*time_emb.shape, 1, 1)
        h = self.block1(x, scale_shift=time_emb.chunk(2, dim=1))
        return self.block2(h) + self.res_conv(x)


class LinearAttention(nn.Module):
    def __init__(self, dim, heads, dim_head, num_mem_kv=4):
        super().__init__()
        self.scale, self.heads, hidden_dim = dim_head**-0.5, heads, dim_head * heads
        self.norm, self.mem_kv = RMSNorm(dim), nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x):
        b, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in qkv)
        mk, mv = (t.unsqueeze(0).expand(b, *t.shape) for t in self.mem_kv)
        k, v = (torch.cat(pair, dim=-1) for pair in ((mk, k), (mv, v)))
        q = q.softmax(dim=-2)
        k = k.softmax(dim=-1)
        q = q * self.scale
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, -1, h, w))


class Attend(nn.Module):
    def __init__(self, flash):
        super().__init__()
        self.flash, self.attn_dropout = flash, nn.Dropout(0.0)

    def forward(self, q, k, v):
        if self.flash:
            q, k, v = (t.contiguous() for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        attn = self.attn_dropout(sim.softmax(dim=-1))
        return einsum("b h i j, b h j d -> b h i d", attn, v)


class Attention(nn.Module):
    def __init__(self, dim, heads, dim_head, num_mem_kv=4, flash=False):
        super().__init__()
        self.heads, hidden_dim = heads, dim_head * heads
        self.norm, self.attend = RMSNorm(dim), Attend(flash)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, -1, h * w).permute(0, 1, 3, 2) for t in qkv)
        mk, mv = (t.unsqueeze(0).expand(b, *t.shape) for t in self.mem_kv)
        k, v = (torch.cat(pair, dim=-2) for pair in ((mk, k), (mv, v)))
        out = self.attend(q, k, v)
        return self.to_out(out.permute(0, 1, 3, 2).reshape(b, -1, h, w))


class Unet(nn.Module):
    def __init__(
        self,
        dim,
        dim_mults=(1, 2),
        channels=3,
        self_condition=False,
        learned_variance=False,
        learned_sinusoidal_cond=False,
        full_attn=(False, True),
        flash_attn=False,
        attn_dim_head=8,
        attn_heads=2,
    ):
        super().__init__()
        self.self_condition = self_condition
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), dim, 7, padding=3)
        dims = [dim, *(dim * m for m in dim_mults)]
        time_dim = dim * 4
        embedding = LearnedSinusoidalPosEmb(16) if learned_sinusoidal_cond else SinusoidalPosEmb(dim)
        fourier_dim = 17 if learned_sinusoidal_cond else dim
        layers = nn.Linear(fourier_dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        self.time_mlp = nn.Sequential(embedding, *layers)

        def attention(width, full):
            if full:
                return Attention(width, attn_heads, attn_dim_head, flash=flash_attn)
            return LinearAttention(width, attn_heads, attn_dim_head)

        def resnet(dim_in, dim_out):
            return ResnetBlock(dim_in, dim_out, time_dim)

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        levels = [*zip(dims[:-1], dims[1:], full_attn, strict=True)]
        for i, (dim_in, dim_out, full) in enumerate(levels):
            last = i == len(levels) - 1
            down = nn.Conv2d(dim_in, dim_out, 3, padding=1) if last else downsample(dim_in, dim_out)
            blocks = resnet(dim_in, dim_in), resnet(dim_in, dim_in), attention(dim_in, full), down
            self.downs.append(nn.ModuleList(blocks))
        mid = dims[-1]
        self.mid_block1, self.mid_attn, self.mid_block2 = resnet(mid, mid), attention(mid, True), resnet(mid, mid)
        for i, (dim_in, dim_out, full) in enumerate(reversed(levels)):
            last = i == len(levels) - 1
            up = nn.Conv2d(dim_out, dim_in, 3, padding=1) if last else upsample(dim_out, dim_in)
            blocks = (resnet(dim_out + dim_in, dim_out) for _ in range(2))
            self.ups.append(nn.ModuleList([*blocks, attention(dim_out, full), up]))
        self.final_res_block = resnet(dim * 2, dim)
        self.final_conv = nn.Conv2d(dim, channels * (2 if learned_variance else 1), 1)

    def forward(self, x, time, x_self_cond=None):
        if self.self_condition:
            x_self_cond = torch.zeros_like(x) if x_self_cond is None else x_self_cond
            x = torch.cat((x_self_cond, x), dim=1)
        x = self.init_conv(x)
        r = x.clone()
        t = self.time_mlp(time)
        h = []
        for block1, block2, attn, down in self.downs:
            x = block1(x, t)
            h.append(x)
            x = block2(x, t)
            x = attn(x) + x
            h.append(x)
            x = down(x)
        x = self.mid_block1(x, t)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, t)
        for block1, block2, attn, up in self.ups:
            x = torch.cat((x, h.pop()), dim=1)
            x = block1(x, t)
            x = torch.cat((x, h.pop()), dim=1)
            x = block2(x, t)
            x = attn(x) + x
            x = up(x)
        x = torch.cat((x, r), dim=1)
        return self.final_conv(self.final_res_block(x, t))

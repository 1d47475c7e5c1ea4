"""Networks of drawn layers, channels, sizes and batches on the target for GPUs."""

import copy
import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cmfast

from ..networks import error, exact
from .device import DEVICE, ON_GPU

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CHANNELS = st.sampled_from([*range(1, 21), 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 130, 160, 192, 199, 200])


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a network is made of."""

    dims: int
    inputs: int
    inner: int
    outer: int
    groups: int
    first: int
    second: int
    silu: bool
    add: bool
    film: bool
    resample: str | None
    residual: bool
    heads: int
    layer_norm: bool
    concatenated: bool

    @classmethod
    def drawn(cls):
        def check(layers):
            head = layers.outer // layers.heads if layers.heads else 16
            return layers.inner % layers.groups == 0 and 16 <= head <= 128 and layers.outer % (layers.heads or 1) == 0

        return st.builds(
            cls,
            dims=st.sampled_from([1, 2, 2, 3]),
            inputs=st.integers(1, 7),
            inner=CHANNELS,
            outer=CHANNELS,
            groups=st.sampled_from([1, 2, 4, 8, 32]),
            first=st.sampled_from([1, 3]),
            second=st.sampled_from([1, 3]),
            silu=st.booleans(),
            add=st.booleans(),
            film=st.booleans(),
            resample=st.sampled_from([None, None, "nearest", "average", "stride"]),
            residual=st.booleans(),
            heads=st.integers(0, 2),
            layer_norm=st.booleans(),
            concatenated=st.booleans(),
        ).filter(check)


class Net(nn.Module):
    """Convolution, group norm with what is added to it, resampling, convolution, attention, and a norm of a pair."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = a = layers
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[a.dims - 1]
        self.first = conv(a.inputs, a.inner, a.first, padding=a.first // 2)
        self.add = nn.Linear(6, a.inner)
        self.norm = nn.GroupNorm(a.groups, a.inner)
        self.film = nn.Linear(6, 2 * a.inner)
        self.second = conv(a.inner, a.outer, a.second, 2 if a.resample == "stride" else 1, a.second // 2)
        self.residual = conv(a.inner, a.outer, 1)
        self.attention_norm = nn.GroupNorm(1, a.outer)
        self.qkv, self.projection = nn.Conv1d(a.outer, 3 * a.outer, 1), nn.Conv1d(a.outer, a.outer, 1)
        self.layer_norm = nn.LayerNorm(a.outer)
        self.joined = a.outer + a.inputs if a.concatenated and a.resample is None else a.outer
        self.last_norm, self.last = nn.GroupNorm(1, self.joined), conv(self.joined, 3, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        a = self.layers
        h = short = self.first(x)
        if a.add:
            h = h + self._rows(self.add(embedding))
        h = self.norm(h)
        if a.film:
            scale, shift = self.film(embedding).chunk(2, 1)
            h = h * (1 + self._rows(scale)) + self._rows(shift)
        h = F.silu(h) if a.silu else h
        if a.resample in ("nearest", "average"):
            h, short = self._resampled(h), self._resampled(short)
        h = self.second(h)
        if a.residual and a.resample != "stride":
            h = h + self.residual(short)
        h = self._attended(h) if a.heads else h
        if a.layer_norm:
            h = self.layer_norm(h.movedim(1, -1)).movedim(-1, 1)
        if self.joined > a.outer:
            h = torch.cat((h, x), 1)
        return self.last(F.silu(self.last_norm(h)))

    def _rows(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *(1,) * self.layers.dims)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.layers.resample == "nearest":
            return F.interpolate(x, scale_factor=2.0)
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[self.layers.dims - 1](x, 2)

    def _attended(self, h: Tensor) -> Tensor:
        tokens = h.flatten(2)
        packed = self.qkv(self.attention_norm(tokens)).unflatten(1, (self.layers.heads, -1))
        q, k, v = (part.mT for part in packed.chunk(3, 2))
        out = F.scaled_dot_product_attention(q, k, v).mT.reshape(tokens.shape)
        return (tokens + self.projection(out)).reshape(h.shape)


@given(
    layers=Layers.drawn(),
    batch=st.integers(1, 4),
    sizes=st.lists(st.integers(2, 7), min_size=3, max_size=3),
    mean=st.sampled_from([0.0, 0.0, 20.0]),
    dtype=st.sampled_from([F32, F32, BF16, F16]),
)
@settings(max_examples=200 if ON_GPU else 8, deadline=None)
@torch.no_grad()
def test_networks_of_drawn_layers(layers, batch, sizes, mean, dtype):
    torch.manual_seed(0)
    net = Net(layers).eval().to(DEVICE)
    for p in net.parameters():
        nn.init.normal_(p, 0.5, 0.3) if p.ndim == 1 else nn.init.normal_(p, std=p[0].numel() ** -0.5)
    sizes = [min(size, 7 if layers.dims < 3 else 4) * (6 if layers.dims == 1 else 1) for size in sizes[: layers.dims]]
    inputs = torch.randn(batch, layers.inputs, *sizes, device=DEVICE) + mean, torch.randn(batch, 6, device=DEVICE)
    found, expected = cmfast.accelerate(net, dtype)(*inputs), exact(net, inputs)
    if dtype == F32:
        allowed = max(1e-5, 2 * error(net(*inputs), expected))
    else:
        plain = copy.deepcopy(net).to(dtype)
        # torch's own average of a video in these dtypes is for GPUs alone.
        there = ON_GPU or layers.dims < 3 or layers.resample != "average"
        allowed = 2 * error(plain(*(x.to(dtype) for x in inputs)), expected) if there else 0.02
        allowed = max(allowed, 4 * torch.finfo(dtype).eps)  # where torch's is right by luck
    assert error(found, expected) <= allowed

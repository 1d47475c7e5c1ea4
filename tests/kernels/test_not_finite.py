"""NaN and infinity in any input reach the outputs that they reach in plain PyTorch, on every backend."""

import pytest
import torch
from cmfast.kernels import (
    apply_group_norm,
    attention,
    channel_moments,
    channel_norm,
    consistency_step,
    conv2d,
    fold_group_norm,
    group_norm,
    prepare_conv,
    timestep_embedding,
)
from torch.nn import functional as F

from .backends import served

N, C, H, W = 2, 20, 5, 7
VALUES = [torch.nan, torch.inf, -torch.inf]


def _attention(q, k, v, backend=None):
    if backend:
        return attention(q, k, v, scale=0.3, backend=backend)
    weights = (0.3 * q.float() @ k.float().mT).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def _group_norm(x, weight, bias, scale, shift, backend=None):
    if backend:
        return group_norm(x, 4, weight, bias, scale=scale, shift=shift, activation="silu", backend=backend)
    y = F.group_norm(x.float(), 4, weight.float(), bias.float())
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]).to(x.dtype)


def _channel_norm(x, weight, bias, backend=None):
    if backend:
        return channel_norm(x, weight, bias, backend=backend)
    return F.layer_norm(x.movedim(1, -1).float(), (C,), weight.float(), bias.float()).movedim(-1, 1).to(x.dtype)


def _rms(x, weight, bias, backend=None):
    if backend:
        return channel_norm(x, weight, bias, centred=False, least=1e-6, backend=backend)
    square = x.square().mean(1, keepdim=True).clamp_min(1e-6)
    return x * torch.rsqrt(square + 1e-5) * weight[:, None, None] + bias[:, None, None]


def _moments(x, backend=None):
    """The means: they say whether the deviations are finite, too."""
    return channel_moments(x, backend=backend)[:, 0] if backend else x.float().mean((2, 3))


def _normed(x, weight, bias, backend=None):
    """The two operators that a group norm is divided into."""
    if backend is None:
        return F.group_norm(x.float(), 4, weight.float(), bias.float()).to(x.dtype)
    moments = channel_moments(x, backend=backend)
    return apply_group_norm(x, moments, 4, weight, bias, backend=backend)


def _folded(x, weight, bias, backend=None):
    if backend is None:
        return F.group_norm(x.float(), 4, weight.float(), bias.float()).to(x.dtype)
    gain, offset = fold_group_norm(channel_moments(x, backend=backend), H * W, 4, weight, bias, backend=backend)
    return (x * gain[:, :, None, None] + offset[:, :, None, None]).to(x.dtype)


def _convolution(kernel):
    def convolve(x, bias, residual, gain, offset, backend=None):
        weight = torch.randn(12, C, kernel, kernel, generator=torch.Generator().manual_seed(1)) * 0.2
        if backend:
            prepared = prepare_conv(weight, bias, padding=kernel // 2, height=H, width=W, dtype=_products(x), tile=1)
            residual = residual.contiguous(memory_format=torch.channels_last)
            return conv2d(x, prepared, residual=residual, gain=gain, offset=offset, silu=True, backend=backend).out
        x = F.silu(x.float() * gain[:, :, None, None] + offset[:, :, None, None])
        return (F.conv2d(x, weight, bias.float(), padding=kernel // 2) + residual.float()).to(residual.dtype)

    return convolve


def _products(x):
    return torch.float32 if x.dtype == torch.float32 else x.dtype


def _step(x, output, backend=None):
    if backend:
        return consistency_step(x, output, 0.4, 0.7, backend=backend).denoised
    return (0.4 * x.float() + 0.7 * output.float()).to(x.dtype)


def _timesteps(t, backend=None):
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    if backend:
        return timestep_embedding(t, frequencies, backend=backend)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


IMAGE, CHANNELS, OUTPUTS, ROWS = (N, C, H, W), (C,), (N, 12, H, W), (N, C)
HEADS = (N, 2, 19, 16)

#: name: the operator that must be served, the function, the shapes of its inputs
CASES = {
    "attention": ("attention", _attention, {"q": HEADS, "k": HEADS, "v": HEADS}),
    "group_norm": (
        "group_norm",
        _group_norm,
        {"x": IMAGE, "weight": CHANNELS, "bias": CHANNELS, "scale": ROWS, "shift": ROWS},
    ),
    "channel_norm": ("channel_norm", _channel_norm, {"x": IMAGE, "weight": CHANNELS, "bias": CHANNELS}),
    "channel_norm-rms": ("channel_norm", _rms, {"x": IMAGE, "weight": CHANNELS, "bias": CHANNELS}),
    "channel_moments": ("channel_moments", _moments, {"x": IMAGE}),
    "apply_group_norm": ("apply_group_norm", _normed, {"x": IMAGE, "weight": CHANNELS, "bias": CHANNELS}),
    "fold_group_norm": ("fold_group_norm", _folded, {"x": IMAGE, "weight": CHANNELS, "bias": CHANNELS}),
    "conv2d-1x1": (
        "conv2d",
        _convolution(1),
        {"x": IMAGE, "bias": (12,), "residual": OUTPUTS, "gain": ROWS, "offset": ROWS},
    ),
    "conv2d-3x3": (
        "conv2d",
        _convolution(3),
        {"x": IMAGE, "bias": (12,), "residual": OUTPUTS, "gain": ROWS, "offset": ROWS},
    ),
    "consistency_step": ("consistency_step", _step, {"x": IMAGE, "output": IMAGE}),
    "timestep_embedding": ("timestep_embedding", _timesteps, {"t": (N,)}),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, *p.values, marks=p.marks, id=f"{case}-{p.id or p.values[0]}")
        for case, (op, *_) in CASES.items()
        for p in served(op)
        if (op, p.values[0]) != ("conv2d", "cuda")  # not float32: test_conv_cuda.py
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # by the interpreter
def test_it_reaches_what_it_reaches_in_plain_torch(case, backend, value):
    _, function, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in inputs.items():
        for at in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = tensor.clone()
            changed.view(-1)[at] = value
            arguments = inputs | {name: changed}
            expected, actual = function(**arguments), function(**arguments, backend=backend)
            if case != "attention":  # infinity may become NaN where factors are folded, or two infinities subtracted
                expected, actual = (t.where(t.isfinite(), torch.nan) for t in (expected, actual))
            close = torch.allclose(actual, expected, equal_nan=True, rtol=1e-3, atol=1e-3)
            assert close, f"{value} at {name}[{at}]: {actual}, expected {expected}"


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("keys", [70, 700])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_first_keys_have_no_weight(keys, backend):
    """More of them than any backend meets at a time: the largest score is -inf then."""
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (19, keys + 5, keys + 5))
    q[..., 0] = 1.0
    k[:, 0, :keys, 0] = -torch.inf
    expected = _attention(q, k, v)
    assert expected.isfinite().all()
    torch.testing.assert_close(attention(q, k, v, scale=0.3, backend=backend), expected, rtol=1e-3, atol=1e-3)
    k[:, 0, :, 0] = -torch.inf
    out = attention(q, k, v, scale=0.3, backend=backend)
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", [p for p in served("conv2d") if p.values[0] == "cpu"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_it_stays_within_the_tiles_that_read_it(tile, products, value, backend):
    """Winograd's forms spread it, no farther."""
    x = torch.randn(1, C, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(12, C, 3, 3, generator=torch.Generator().manual_seed(1))
    x[0, 3, 8, 5] = value
    prepared = prepare_conv(weight, padding=1, height=16, width=16, dtype=products, tile=tile, transformed=True)
    y = conv2d(x, prepared, backend=backend).out[0].isfinite().all(0)
    assert not y[7:10, 4:7].any()
    y[7 // tile * tile : 9 // tile * tile + tile, 4 // tile * tile : 6 // tile * tile + tile] = True
    assert y.all()

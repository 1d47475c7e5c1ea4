"""Each operator at the released networks' shapes, on every backend that serves this machine's fastest device."""

import pytest
import torch
from cmfast.kernels import backends

from cmfast import kernels

from .shapes import ATTENTION, GROUP_NORM, STEP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SERVING = [name for name in backends.BACKENDS if backends.available(name, "group_norm")[0]]


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def timed(benchmark, function, backend):
    """Time function(backend), synchronised, after comparing it with the definition."""
    expected, actual = function("reference"), function(backend)
    tolerance = 1e-4 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def run():
        function(backend)
        wait()

    benchmark(run)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", GROUP_NORM)
def test_group_norm(benchmark, shape, layout, dtype, backend):
    channels, size, groups = GROUP_NORM[shape]
    x = tensor(1, channels, size, size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    weight, bias = tensor(channels, dtype=dtype), tensor(channels, dtype=dtype)
    film = {name: tensor(1, channels, dtype=dtype) for name in ("scale", "shift")}
    benchmark.extra_info["bytes"] = 3 * x.numel() * x.element_size()
    timed(
        benchmark,
        lambda backend: kernels.group_norm(x, groups, weight, bias, **film, activation="silu", backend=backend),
        backend,
    )


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention(benchmark, shape, dtype, backend):
    heads, tokens, head_channels = ATTENTION[shape]
    q, k, v = kernels.split_qkv(tensor(1, tokens, 3 * heads * head_channels, dtype=dtype), heads, channels_dim=2)
    benchmark.extra_info["flops"] = 4 * heads * tokens * tokens * head_channels
    timed(benchmark, lambda backend: kernels.attention(q, k, v, backend=backend), backend)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("shape", STEP)
def test_consistency_step(benchmark, shape, backend):
    x, output = tensor(1, *STEP[shape]), tensor(1, *STEP[shape])

    def function(backend):
        step = kernels.consistency_step(
            x, output, 0.1, 0.9, clip=1.0, alpha=1.0, beta=2.0, seed=1, input_scale=0.5, backend=backend
        )
        return step.model_input

    benchmark.extra_info["bytes"] = 5 * x.numel() * x.element_size()
    timed(benchmark, function, backend)

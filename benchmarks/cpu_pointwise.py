"""The CPU's one-element convolutions and linear layers beside torch's own (oneDNN), in one interleaved run.

    python benchmarks/cpu_pointwise.py [--threads 1] [--isa avx512]

The shapes are the released imagenet64 network's: the projections around attention (the first with a folded group
norm, the second with residual and moments), skip connections of pairs, and the embedding's linear layers, with SiLU.
torch's has its bias alone. Weights are read from memory, not from a cache: as many copies of them as fill it take
turns. Each output is checked before it is timed. The least of so many rounds, in milliseconds.
"""

import itertools

import torch
from cmfast.kernels import prepare_conv
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.cpu.conv import conv2d
from interleaved import options, print_table, settle
from torch.nn import functional as F

#: bytes of all copies of a layer's weights
COLD = 128 << 20
#: samples, input channels (of a pair), output channels, height, width, and what is fused
SHAPES = {
    **{
        f"{kind} {c} at {size}², batch {n}": (n, (c,), c * outputs, size, size, parts)
        for n in (1, 8)
        for c, size in ((384, 32), (576, 16), (768, 8))
        for kind, outputs, parts in (("qkv", 3, ("affine",)), ("proj", 1, ("residual", "moments")))
    },
    "skip 384+192 → 192 at 64²": (1, (384, 192), 192, 64, 64, ()),
    "skip 768+576 → 576 at 16²": (1, (768, 576), 576, 16, 16, ()),
    "skip 768+768 → 768 at 8²": (1, (768, 768), 768, 8, 8, ()),
    **{f"linear 768 → 36864, {n} rows": (1, (768,), 36864, n, 1, ("silu",)) for n in (1, 2, 4, 8)},
    "linear 768 → 768, 1 row": (1, (768,), 768, 1, 1, ("silu",)),
    "digits qkv 64 at 4²": (1, (64,), 192, 4, 4, ("affine",)),
    "digits skip 64+32 → 32 at 8²": (1, (64, 32), 32, 8, 8, ()),
}
ERRORS = {"fp32": 1e-5, "bf16": 1e-2}


def onednn(x, weight, bias, copies):
    """torch's convolution with weights that are reordered once."""
    geometry = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
    ordered = [torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape)) for _ in range(copies)]
    turns = itertools.cycle(ordered)
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, next(turns), bias, *geometry, "none", [], "")


def candidates(n, channels, outputs, height, width, parts):
    """The calls to time, by name; ours are checked against float64."""
    inputs = [torch.randn(n, c, height, width).to(memory_format=torch.channels_last) for c in channels]
    total = sum(channels)
    weight, bias = torch.randn(outputs, total, 1, 1) / total**0.5, torch.randn(outputs)
    gain, offset = torch.randn(2, n, total).unbind() if "affine" in parts else (None, None)
    shape = (n, outputs, height, width)
    residual = torch.randn(shape).to(memory_format=torch.channels_last) if "residual" in parts else None
    x = torch.cat(inputs, 1)
    u = x.double() if gain is None else x.double() * gain[..., None, None] + offset[..., None, None]
    exact = F.conv2d(F.silu(u) if "silu" in parts else u, weight.double(), bias.double())
    exact = exact if residual is None else exact + residual
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        copies = max(1, COLD // (weight.numel() * dtype.itemsize))
        calls[f"oneDNN {name}"] = onednn(x.to(dtype), weight.to(dtype), bias.to(dtype), copies)
        prepared = prepare_conv(weight, bias, dtype=dtype, height=height, width=width)
        turns = itertools.cycle([prepared, *(prepared._replace(packed=prepared.packed.clone()) for _ in range(copies))])

        def ours(turns=turns):
            fused = {"gain": gain, "offset": offset, "silu": "silu" in parts, "residual": residual}
            pair = (inputs[0], inputs[1] if len(inputs) > 1 else None)
            return conv2d(ConvArguments(*pair, *next(turns), **fused, moments="moments" in parts))[0]

        error = ((ours().double() - exact).norm() / exact.norm()).item()
        assert error < ERRORS[name], f"{name}: relative error {error:.2g}"
        calls[f"ours {name}"] = ours
    return calls


def main():
    print_table(settle(options(__doc__)), SHAPES.items(), candidates, digits=3)


if __name__ == "__main__":
    with torch.no_grad():
        main()

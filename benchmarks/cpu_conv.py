"""The CPU's 3 x 3 convolutions beside torch's own (oneDNN, weights reordered beforehand), in one interleaved run.

    python benchmarks/cpu_conv.py [--threads 1] [--isa avx512] [--batch 1] [--hot]

Ours has a folded group norm and SiLU on the input, the residual and the output's moments in it; torch's has its bias
alone. Each output is checked before it is timed. The least of so many rounds, in milliseconds. Every call has other
weights than the last, as in a network: they come from memory, unless --hot repeats the same.
"""

import functools
import itertools

import torch
from cmfast.kernels import CONV_FORMS, conv2d, prepare_conv
from interleaved import options, print_table, settle

#: input and output channels, height and width: the released imagenet64 network's
SHAPES = ((192, 192, 64), (384, 192, 64), (384, 384, 32), (768, 384, 32))
SHAPES += ((576, 576, 16), (1152, 576, 16), (768, 768, 8), (1536, 768, 8))
ERRORS = {("fp32", 2): 1e-5, ("fp32", 4): 2e-5, ("bf16", 2): 1e-2, ("bf16", 4): 3e-2}
LAST_LEVEL_CACHE = 96 << 20  # bytes, more than there are


def onednn(x, bias, prepare, copies):
    """torch's convolution with weights that are reordered once."""
    geometry = [1, 1], [1, 1], [1, 1], 1
    ordered = itertools.cycle(
        [torch.ops.mkldnn._reorder_convolution_weight(prepare(), *geometry, list(x.shape)) for _ in range(copies)]
    )
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, next(ordered), bias, *geometry, "none", [], "")


def candidates(in_channels, channels, size, batch, hot):
    """The calls to time, by name; ours are checked against float64."""
    x, residual = (
        torch.randn(batch, c, size, size).to(memory_format=torch.channels_last) for c in (in_channels, channels)
    )
    weight, bias = torch.randn(channels, in_channels, 3, 3) / (9 * in_channels) ** 0.5, torch.randn(channels)
    gain, offset = torch.randn(2, batch, in_channels).unbind()
    copies = 1 if hot else 1 + LAST_LEVEL_CACHE // (4 * weight.numel())
    u = torch.nn.functional.silu(x.double() * gain[..., None, None] + offset[..., None, None])
    exact = torch.nn.functional.conv2d(u, weight.double(), bias.double(), padding=1) + residual
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        reordered = functools.partial(weight.to, dtype, memory_format=torch.channels_last, copy=True)
        calls[f"oneDNN {name}"] = onednn(x.to(dtype), bias.to(dtype), reordered, copies)
        for tile, transformed in CONV_FORMS[dtype][1:]:
            form = f"F{tile}{'' if transformed else ' at use'}"
            form_of = {"dtype": dtype, "tile": tile, "transformed": transformed}
            prepared = itertools.cycle(
                [prepare_conv(weight, bias, padding=1, height=size, width=size, **form_of) for _ in range(copies)]
            )

            def ours(prepared=prepared):
                return conv2d(
                    x,
                    next(prepared),
                    gain=gain,
                    offset=offset,
                    silu=True,
                    residual=residual,
                    moments=True,
                    backend="cpu",
                ).out

            error = ((ours().double() - exact).norm() / exact.norm()).item()
            assert error < ERRORS[name, tile], f"{form} {name}: relative error {error:.2g}"
            calls[f"{form} {name}"] = ours
    return calls


def main():
    arguments = options(__doc__)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--hot", action="store_true")
    given = settle(arguments)
    rows = [("{} → {} at {}²".format(*shape), (*shape, given.batch, given.hot)) for shape in SHAPES]
    print_table(given, rows, candidates, digits=2)


if __name__ == "__main__":
    with torch.no_grad():
        main()

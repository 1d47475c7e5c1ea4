"""The CPU's attention beside torch's, from packed projections [N, T, 3·C], in one interleaved run.

    python benchmarks/cpu_attention.py [--threads 1] [--isa avx512]

The shapes are those of the released networks, imagenet64's and LSUN-256's, and of the digits model. `bf16` multiplies
float32 tensors in bfloat16. Each output is checked before it is timed. The least of so many rounds, in milliseconds.
"""

import torch
from cmfast.kernels import split_qkv
from cmfast.kernels.cpu.attention import attention
from interleaved import options, print_table, settle
from torch.nn import functional as F

#: samples, positions, heads and head size
SHAPES = (
    *((n, t, h, 64) for n in (1, 8) for t, h in ((1024, 6), (256, 9), (64, 12))),
    *((1, t, 16, 64) for t in (1024, 256, 64)),
    *((1, t, h, 32) for t in (64, 16) for h in (1, 2)),
)
LAYOUTS = ("3hd", "h3d")
ERRORS = {"fp32": 1e-5, "bf16": 1e-2}


def candidates(n, t, h, d):
    """The calls to time, by name; ours are checked against float64."""
    calls = {}
    for layout in LAYOUTS:
        q, k, v = split_qkv(torch.randn(n, t, 3 * h * d), h, layout, channels_dim=2)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        if layout == LAYOUTS[0]:
            calls["torch fp32"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
        for name, products in (("fp32", None), ("bf16", torch.bfloat16)):

            def ours(q=q, k=k, v=v, products=products):
                return attention(q, k, v, q.shape[3] ** -0.5, products)[0]

            error = ((ours().double() - exact).norm() / exact.norm()).item()
            assert error < ERRORS[name], f"{name}, {layout}: relative error {error:.2g}"
            calls[f"{name} {layout}"] = ours
    return calls


def main():
    given = settle(options(__doc__))
    print_table(given, [("N{} T{} H{} D{}".format(*shape), shape) for shape in SHAPES], candidates, digits=3)


if __name__ == "__main__":
    with torch.no_grad():
        main()

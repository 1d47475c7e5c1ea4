"""The CPU's 3 x 3 convolutions beside torch's own (oneDNN, weights reordered beforehand), in one interleaved run.

    python benchmarks/cpu_conv.py [--threads 1] [--isa avx512]

Ours has a folded group norm and SiLU on the input, the residual and the output's moments in it; torch's has its bias
alone. Each output is checked before it is timed. The least of so many rounds, in milliseconds.
"""

import argparse
import time

import torch
from cmfast.kernels import conv2d, native, prepare_conv

#: channels, height and width: the released imagenet64 network's
SHAPES = ((192, 64), (384, 32), (576, 16), (768, 8))
FORMS = {"F2": 2, "F4": 4}
ERRORS = {("fp32", "F2"): 1e-5, ("fp32", "F4"): 2e-5, ("bf16", "F2"): 1e-2, ("bf16", "F4"): 3e-2}


def onednn(x, weight, bias):
    """torch's convolution with weights that are reordered once."""
    geometry = [1, 1], [1, 1], [1, 1], 1
    ordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, ordered, bias, *geometry, "none", [], "")


def candidates(channels, size):
    """The calls to time, by name; ours are checked against float64."""
    x, residual = (torch.randn(1, channels, size, size).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(channels)
    gain, offset = torch.randn(2, 1, channels).unbind()
    u = torch.nn.functional.silu(x.double() * gain[..., None, None] + offset[..., None, None])
    exact = torch.nn.functional.conv2d(u, weight.double(), bias.double(), padding=1) + residual
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        weights = weight.to(dtype, memory_format=torch.channels_last)
        calls[f"oneDNN {name}"] = onednn(x.to(dtype), weights, bias.to(dtype))
        for form, tile in FORMS.items():
            prepared = prepare_conv(weight, bias, padding=1, dtype=dtype, height=size, width=size, tile=tile)

            def ours(prepared=prepared):
                return conv2d(
                    x, prepared, gain=gain, offset=offset, silu=True, residual=residual, moments=True, backend="cpu"
                ).out

            error = ((ours().double() - exact).norm() / exact.norm()).item()
            assert error < ERRORS[name, form], f"{form} {name}: relative error {error:.2g}"
            calls[f"{form} {name}"] = ours
    return calls


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--isa", default=native.cpu().build_info()["isa"])
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    error = native.cpu().set_isa(given.isa)
    if error:
        arguments.error(error)
    for row, (channels, size) in enumerate(SHAPES):
        calls = candidates(channels, size)
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(given.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
        if not row:
            print(f"| {given.isa}, threads: {given.threads} | {' | '.join(calls)} |\n|---{'|---' * len(calls)}|")
        print(
            f"| {channels} → {channels} at {size}² | {' | '.join(f'{ms:.2f}' for ms in least.values())} |", flush=True
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()

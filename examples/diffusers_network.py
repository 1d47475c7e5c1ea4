"""A network of diffusers, plain and accelerated: the same call, the same kind of output, and the time of each.

    pip install . diffusers
    python examples/diffusers_network.py --model folder --dtype bfloat16
    python examples/diffusers_network.py                     # one of random weights

Weights that change afterwards are noticed at the next call: nothing has to be done.
"""

import argparse
import statistics
import time

import torch
from diffusers import UNet2DModel

import cmfast


def main() -> None:
    """Read the command line, compare the outputs, and time both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name on the hub, or a folder, of a UNet2DModel")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    network = UNet2DModel(sample_size=64) if arguments.model is None else UNet2DModel.from_pretrained(arguments.model)
    network.eval()
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(arguments.batch, network.config.in_channels, height, width)
    timestep = torch.full((arguments.batch,), 500)

    fast = cmfast.accelerate(network, getattr(torch, arguments.dtype))
    print(f"{type(fast).__name__} of {sum(p.numel() for p in fast.parameters()) / 1e6:.0f} million parameters")
    print(f"largest difference: {difference(network, fast, x, timestep):.1e} of the largest value")
    plain, accelerated = times((network, fast), x, timestep, arguments.rounds)
    print(f"diffusers: {1e3 * plain:.1f} ms, cmfast: {1e3 * accelerated:.1f} ms")

    with torch.no_grad():  # a write in place, as an optimiser or a LoRA that is fused makes it
        network.conv_out.weight.mul_(2)
    print(f"after a change of the weights: {difference(network, fast, x, timestep):.1e}")


@torch.inference_mode()
def difference(network, fast, x, timestep):
    """The largest difference of the outputs, relative to the largest value."""
    expected, found = network(x, timestep).sample, fast(x, timestep).sample
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def times(networks, x, timestep, rounds):
    """Median seconds of a call of each network; they take turns."""
    seconds = [[] for _ in networks]
    for _ in range(rounds):
        for network, taken in zip(networks, seconds, strict=True):
            begin = time.perf_counter()
            network(x, timestep)
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in seconds]


if __name__ == "__main__":
    main()

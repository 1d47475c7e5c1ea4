"""A network of your own: accelerated as it is, and sampled from as a consistency model.

    pip install .
    python examples/your_own_network.py --steps 2
    cmfast profile --from examples/your_own_network.py:example --explain

The network here is a small one of random weights: what it draws is noise. Put yours in its place.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import cmfast


class Network(nn.Module):
    """A residual network with FiLM from the noise level, written in torch's own operators."""

    def __init__(self, channels: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks))
        self.films = nn.ModuleList(nn.Linear(32, 2 * channels) for _ in range(blocks))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -6, 16)))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images [N, 3, H, W] and timesteps [N]: what a `cmfast.ConsistencyModel` calls its network with."""
        angles = timesteps[:, None] * self.frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], 1)
        x = self.first(x)
        for norm, conv, film in zip(self.norms, self.convs, self.films, strict=True):
            scale, shift = film(embedding)[:, :, None, None].chunk(2, 1)
            x = x + conv(F.silu(norm(x) * (1 + scale) + shift))
        return self.last(x)


def example() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A network and the arguments of its call, as `cmfast profile --from` takes them."""
    return Network().eval(), (torch.randn(1, 3, 32, 32), torch.tensor([100.0]))


def main() -> None:
    """Read the command line, accelerate the network, and draw samples with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    network, (x, timesteps) = example()
    fast = cmfast.accelerate(network)
    with torch.inference_mode():
        print(f"largest difference of one evaluation: {(fast(x, timesteps) - network(x, timesteps)).abs().max():.1e}")

    samples = {}
    for name, used in (("plain", network), ("accelerated", fast)):
        model = cmfast.ConsistencyModel(used, cmfast.preconditioning.Consistency(), sample_shape=(3, 32, 32))
        samples[name] = model.sample(arguments.count, steps=arguments.steps, seed=arguments.seed)
    print(f"largest difference of a sample: {(samples['plain'] - samples['accelerated']).abs().max():.1e}")
    print(f"samples: {list(samples['accelerated'].shape)}")


if __name__ == "__main__":
    main()

"""The engine's target for GPUs: a graph becomes launches of the Triton kernels, and calls of torch for the rest."""

from .target import GpuTarget

__all__ = ["GpuTarget"]

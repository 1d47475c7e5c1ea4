"""The engine's target for CPUs: a graph becomes a program of calls of csrc/cpu's kernels, and of torch for the rest."""

from .target import CpuTarget

__all__ = ["CpuTarget"]

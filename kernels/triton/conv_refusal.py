"""Which convolutions the Triton kernels do not serve, told without importing triton."""

import math

from ..conv_arguments import ConvArguments, resampled_sizes
from ..layout import reach

#: Elements of a sample's memory: the kernels count them in 32 bits.
MOST = 1 << 31


def refusal(a: ConvArguments) -> str:
    """Why a convolution is not served: a sample of an image reaches too far. Empty where it is served."""
    reaches = [(list(image.shape), reach(image)) for image in (a.h, a.skip, a.residual) if image is not None]
    made = [a.output_shape()] + ([input_shape(a)] if makes_input(a) else [])
    reaches += [(shape, math.prod(shape[1:])) for shape in made]
    shape, most = max(reaches, key=lambda of_shape: of_shape[1])
    if most <= MOST:
        return ""
    return f"a sample may reach over 2^31 elements of memory, got {shape}, which reaches over {most}"


def makes_input(a: ConvArguments) -> bool:
    """Whether what is done to the input is written by a launch before the products."""
    taps = math.prod(a.weight.shape[2:])
    return bool(a.gate) or a.resample == "average" or (taps > 1 and (a.gain is not None or a.silu))


def input_shape(a: ConvArguments) -> list[int]:
    """The shape [N, C, *sizes] of the input that is written: all that is done to it before, but for upsampling."""
    n, c, *sizes = a.h.shape
    channels = c if a.gate or a.skip is None else c + a.skip.shape[1]
    return [n, channels, *(resampled_sizes(sizes, a.resample) if a.resample == "average" else sizes)]

"""Which calls of the operators the check makes, and at which sizes; what they are is cmfast.benchmarking's."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator

import torch
from cmfast.kernels import shapes

from cmfast.benchmarking import calls as package
from cmfast.benchmarking import serving
from cmfast.benchmarking.calls import name

BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Shape, layout and form of the layer and RMS norms that are checked, everywhere.
CHANNEL_NORMS = (
    ((35, 320), "tokens", "layer affine"),
    ((2, 67, 9, 5), "nhwc", "rms affine film silu"),
    ((1, 40, 7, 9), "nchw", "layer affine"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked, with every dtype, and what is timed.

    A norm is (shapes, layout, form, groups), an attention (n, heads, t, s, d, form), a step (shape, layout), a
    convolution (n, channels, of the second of a pair, columns, size, kernel, form). The norms are also those of given
    moments, which are checked at their first shapes.
    """

    convolutions: tuple = ()
    norms: tuple = ()
    attentions: tuple = ()
    steps: tuple = ()
    timed: tuple[shapes.Call, ...] = ()


def sizes(device) -> Sizes:
    """Two released shapes and an odd one to check, and the released networks' to time; small ones in the dry run."""
    if device.emulated:
        return Sizes(
            convolutions=(
                (2, 24, 0, 20, 4, 3, "affine silu residual moments"),
                (1, 16, 17, 20, 3, 3, "nearest moments"),
                (1, 20, 0, 24, 4, 1, "affine residual moments"),
            ),
            norms=(
                (((1, 32, 6, 6),), "nhwc", "affine silu", 32),
                (((1, 64, 4, 4), (1, 32, 4, 4)), "nhwc", "affine film silu", 32),
                (((2, 35, 3, 5),), "nchw", "affine add silu", 5),
            ),
            attentions=((1, 2, 32, 32, 32, "packed 3hd"), (1, 1, 64, 64, 32, "packed h3d"), (2, 1, 17, 9, 24, "cross")),
            steps=(((2, 3, 8, 8), "nchw"), ((1, 4, 8, 8), "nhwc"), ((3, 3, 3, 5), "nchw")),
            timed=(
                shapes.conv_call(1, 24, 0, 20, 4, 3, torch.bfloat16, "affine silu average residual moments"),
                shapes.norm_call(((1, 64, 8, 8),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.norm_gradient_call(((1, 32, 4, 4),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.moments_call((1, 32, 4, 4), "nhwc", torch.bfloat16),
                shapes.fold_call(((1, 32, 4, 4),), torch.bfloat16, "affine film"),
                shapes.applied_norm_call(((1, 32, 4, 4),), "nhwc", torch.bfloat16, "affine silu average"),
                shapes.attention_call(1, 2, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.attention_gradient_call(1, 1, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.step_call((1, 3, 8, 8), "nchw", torch.float32, True),
            ),
        )
    return Sizes(
        convolutions=(
            (2, 192, 0, 192, 64, 3, "affine silu residual moments"),
            (1, 384, 192, 384, 32, 3, "affine silu moments"),
            (1, 384, 0, 384, 16, 3, "nearest residual moments"),
            (3, 35, 21, 50, 7, 3, "affine silu average residual moments"),
            (2, 576, 0, 100, 9, 1, "affine residual moments"),
        ),
        norms=(
            (((1, 192, 64, 64),), "nhwc", "affine silu", 32),
            (((1, 768, 16, 16), (1, 576, 16, 16)), "nhwc", "affine film silu", 32),
            (((3, 35, 7, 9),), "nchw", "affine add silu", 5),
        ),
        attentions=(
            (1, 6, 1024, 1024, 64, "packed 3hd"),
            (1, 9, 256, 256, 64, "packed h3d"),
            (2, 3, 65, 77, 40, "cross"),
        ),
        steps=(((16, 3, 64, 64), "nchw"), ((1, 3, 256, 256), "nhwc"), ((3, 3, 7, 5), "nchw")),
        timed=tuple(_timed()),
    )


def _timed() -> Iterator[shapes.Call]:
    """The most telling first: batch 1 in bfloat16 of every operator, a video decoder's norms, batch 16, the rest.

    Of these the convolutions are the larger part of a network's time: six of them, then each operator in turn.
    """
    known = list(shapes.calls())
    first = [
        call for call in known if call.dtype == "bfloat16" and call.shape.startswith("1x") and "nchw" not in call.layout
    ]
    convolutions, others = ([c for c in first if (c.op == "conv2d") == kind] for kind in (True, False))
    by_operator = [[c for c in others if c.op == op] for op in dict.fromkeys(c.op for c in others)]
    turns = itertools.zip_longest(*by_operator, convolutions[6:])
    first = [*convolutions[:6], *(call for turn in turns for call in turn if call is not None)]
    yield from first
    for shape in ((1, 128, 17, 480, 848), (1, 512, 17, 60, 106)):
        yield shapes.norm_call((shape,), "nhwc", torch.bfloat16, "affine silu")
    norms = (
        (((16, 384, 32, 32),), "affine film silu"),
        (((16, 576, 16, 16),), "affine"),
        (((16, 768, 8, 8),), "affine film silu"),
        (((16, 192, 64, 64), (16, 192, 64, 64)), "affine silu"),
    )
    for norm, form in norms:
        yield shapes.norm_call(norm, "nhwc", torch.bfloat16, form)
    for heads, tokens in ((9, 256), (12, 64)):
        yield shapes.attention_call(16, heads, tokens, tokens, 64, torch.bfloat16, "packed 3hd")
    yield shapes.attention_gradient_call(16, 6, 1024, 1024, 64, torch.bfloat16, "packed 3hd")
    done = {name(call) for call in first}
    yield from (call for call in known if name(call) not in done)


def checked(device) -> Iterator[shapes.Call]:
    """Every operator with every dtype, forward and backward, then what is timed (without the video decoder's)."""
    found = sizes(device)
    for dtype in DTYPES:
        for *numbers, form in found.convolutions:
            yield shapes.conv_call(*numbers, dtype, form)
        for norm, layout, form, groups in found.norms:
            yield shapes.moments_call(norm[0], layout, dtype)
            yield shapes.fold_call(norm, dtype, form.removesuffix(" silu"), groups)
            yield shapes.applied_norm_call(norm, layout, dtype, form + " average", groups)
            yield shapes.norm_call(norm, layout, dtype, form, groups)
            yield shapes.norm_gradient_call(norm, layout, dtype, form, groups)
        for shape, layout, form in CHANNEL_NORMS:
            yield shapes.channel_norm_call(shape, layout, dtype, form)
        for *numbers, form in found.attentions:
            yield shapes.attention_call(*numbers, dtype, form)
            yield shapes.attention_gradient_call(*numbers, dtype, form)
        for shape, layout in found.steps:
            yield shapes.step_call(shape, layout, dtype, True)
            yield shapes.step_gradient_call(shape, layout, dtype)
    yield from (shapes.timesteps_call(*numbers) for numbers in ((1, 96), (3, 35)))
    yield from (call for call in found.timed if len(call.shape.split("x")) < 5 or " " in call.shape)


def backends_of(call: shapes.Call) -> list[str]:
    """The backends that have a kernel for the call."""
    modules = {name: importlib.import_module(f"cmfast.kernels.{name}") for name in BACKENDS}
    has = [name for name, module in modules.items() if hasattr(module, call.op)]
    return [name for name in has if name != "cuda" or modules[name].serves(call.op, call.arguments)[0]]


def values(call: shapes.Call, device, seed: int = 0) -> tuple:
    """The call's arguments with normal values, a convolution's weights packed as both GPU backends read them."""
    return serving.prepared(call, package.values(call, device.name, seed), "triton")

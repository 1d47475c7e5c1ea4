"""`cmfast convert`: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import FORMATS, Checkpoint, find, left_out, read, write
from .options import dtype_of


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A .pt file, a folder of cmfast or diffusers, a bundled name, a hub id."),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new file (openai) or folder (the others).")],
    to: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(FORMATS)}; openai for a DST that ends in .pt, cmfast for others."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store float32, float16 or bfloat16; what SRC stores by default.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of a diffusers folder's weights, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Of a .pt file that is none of the released models.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="The same.")] = None,
    num_head_channels: Annotated[int | None, typer.Option(min=1, help="The same; 64 by default.")] = None,
) -> None:
    """Write a checkpoint in another format, with the same tensors to the bit."""
    kind = to or ("openai" if destination.suffix == ".pt" else "cmfast")
    if kind not in FORMATS:
        raise ValueError(f"--to must be one of {', '.join(FORMATS)}, got {kind}")
    precision = None if dtype is None else dtype_of(dtype)
    sizes = {"image_size": image_size, "num_heads": num_heads, "num_head_channels": num_head_channels}
    path = find(source, variant=variant, revision=revision)
    config = {name: value for name, value in sizes.items() if value is not None}
    checkpoint = read(path, variant=variant, config=config)
    if precision is not None:
        checkpoint = checkpoint.to(precision)
    write(checkpoint, destination, kind)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.weights.values()})
    print(f"{destination}: {kind}, {len(checkpoint.weights)} tensors of cmfast.UNet, {' and '.join(dtypes)}")
    if kind == "openai":
        _say_what_is_not_kept(checkpoint)


def _say_what_is_not_kept(checkpoint: Checkpoint) -> None:
    """A `.pt` file has weights alone."""
    if fields := left_out(checkpoint):
        print(f"a .pt file does not keep these; load it with {', '.join(f'{k}={v!r}' for k, v in fields.items())}")
    if levels := checkpoint.recommended_levels:
        listed = " or ".join(f"sigmas={values}" for values in levels.values())
        print(f"a .pt file does not keep the recommended levels; sample with {listed}")

"""`cmfast kernels`: what the compilers make of the GPU kernels, on any machine."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

_COLUMNS = {
    "kernel": "kernel",
    "arch": "arch",
    "shape": "shape",
    "layout": "layout",
    "form": "form",
    "dtype": "dtype",
    "programs": "programs",
    "registers": "registers",
    "spill_bytes": "spill B",
    "stack_bytes": "stack B",
    "shared_bytes": "shared B",
    "blocks_per_sm": "blocks/SM",
    "load": "load B",
    "store": "store B",
    "matrix": "matrix instructions",
    "bytes": "bytes",
    "flops": "flops",
    "floor_us": "floor µs",
}


def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, sm_120 or gfx942; repeat for several. [all]")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="An operator; repeat for several. [all]")] = None,
    backend: Annotated[str, typer.Option(help="triton, or cuda: the machine code that was built.")] = "triton",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows instead of a table.")] = False,
) -> None:
    """Report each kernel's resources at the released networks' shapes. Needs no GPU.

    Widths of loads and stores are those of the narrowest and the widest global access. The floor is the time of the
    bytes or operations on the architecture's GPU, whichever is longer, without the launch; bytes are those of the
    launch's tensors, and with --backend cuda of all the call's.
    """
    known_arches, known_ops, report = _report(backend)
    arches, ops = arch or known_arches, op or known_ops
    for value, known, option in (
        *((a, known_arches, "--arch") for a in arches),
        *((o, known_ops, "--op") for o in ops),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    rows = _collect(report(arches, ops))
    if as_json:
        print("[", ",\n".join(json.dumps(row) for row in rows), "]", sep="\n")
    else:
        _print(rows)


def _report(backend: str) -> tuple[list[str], list[str], Callable[[list[str], list[str]], Iterator[dict[str, Any]]]]:
    """The architectures and the operators that a backend has code for, and its report."""
    from ..kernels import cuda, shapes

    if backend == "triton":
        try:
            from ..kernels.triton import static as triton_static
        except ImportError as error:
            raise typer.BadParameter(f'{error}; pip install "cmfast[triton]"') from error
        return list(triton_static.ARCHITECTURES), list(shapes.OPERATORS), triton_static.report
    if backend == "cuda":
        from ..kernels.cuda import static as cuda_static

        try:
            return cuda_static.architectures(), list(cuda.OPERATORS), cuda_static.report
        except ImportError as error:
            raise typer.BadParameter(str(error), param_hint="--backend") from error
    raise typer.BadParameter(f"{backend!r} is not one of triton, cuda", param_hint="--backend")


def _collect(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    return list(tqdm(rows, desc="kernels", unit=" kernels", disable=None, leave=False))


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    gpus = ", ".join(dict.fromkeys(f"{row['arch']} on {row['gpu']}" for row in rows))
    name = {"triton": "Triton", "cuda": "CUDA C++"}[rows[0]["backend"]]
    table = Table(title=f"{name} kernels, compiled without a GPU", caption=f"floor times: {gpus}")
    for name in _COLUMNS.values():
        table.add_column(name)
    for row in rows:
        shown = {
            **row,
            "load": _range(row["load_bytes_min"], row["load_bytes"]),
            "store": _range(row["store_bytes_min"], row["store_bytes"]),
            "matrix": ", ".join(f"{n} {name}" for name, n in row["matrix_instructions"].items()),
            "bytes": f"{row['bytes']:,}",
            "flops": f"{row['flops']:,}",
        }
        table.add_row(*(str(shown[column]) for column in _COLUMNS))
    # A pipe gets whole lines, a terminal its own width.
    Console(width=None if sys.stdout.isatty() else 400).print(table)


def _range(narrowest: int, widest: int) -> str:
    return str(widest) if narrowest == widest else f"{narrowest}–{widest}"

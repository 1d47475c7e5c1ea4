"""A roofline: what operators reach of what the memory and the products of the machine allow.

Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import whole_file
from .ceilings import Ceilings

#: Operators that have a name in the picture: those that take most time.
_NAMED = 8


class Point(NamedTuple):
    """An operator of the picture: its name, how many calls it sums up, and what they took, did and moved."""

    name: str
    calls: int
    seconds: float
    operations: int
    bytes: int


def draw(points: Sequence[Point], ceilings: Ceilings, seconds: float, title: str, path: str | Path) -> None:
    """Write the picture as a PNG; `seconds` are those of all operators, of which the points are those with products.

    Raises:
        ValueError: there are no points.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not points:
        raise ValueError("a roofline shows products (convolutions, linear layers, attention): this network has none")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    intensities = [point.operations / point.bytes for point in points]
    rates = [point.operations / point.seconds / 1e9 for point in points]
    knees = [rate / ceilings.bandwidth for rate in ceilings.products.values()]
    left, right = min(*intensities, *knees) / 4, max(*intensities, *knees) * 4
    _draw_ceilings(axes, ceilings, left, right)
    ordered = sorted(zip(points, intensities, rates, strict=True), key=lambda p: p[0].seconds, reverse=True)
    for i, (point, x, y) in enumerate(ordered):
        share = point.seconds / seconds
        name = f"{point.name} ({100 * share:.0f} %)" if i < _NAMED else None
        axes.scatter(x, y, s=30 + 900 * share, alpha=0.75, label=name, color=f"C{i}" if i < _NAMED else "lightgrey")
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations a byte", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    legend = figure.legend(fontsize=9, loc="outside lower left", ncols=2, frameon=False, columnspacing=1)
    handles: list[Any] = list(legend.legend_handles)
    for handle in handles:
        handle.set_sizes([60])
    others = 1 - sum(point.seconds for point in points) / seconds
    caption = (
        f"{title}. Areas are shares of the time; operators without products take {100 * others:.0f} %. Operations are "
        "those of the definition: Winograd's convolutions do fewer, and can lie above the line of products."
    )
    axes.set_title("\n".join(textwrap.wrap(caption, 128)), fontsize=9, loc="left")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _draw_ceilings(axes: Any, ceilings: Ceilings, left: float, right: float) -> None:
    top = max(ceilings.products.values())
    xs = [left * (right / left) ** (i / 200) for i in range(201)]
    for dtype, rate in ceilings.products.items():
        ys = [min(rate, x * ceilings.bandwidth) / 1e9 for x in xs]
        axes.plot(xs, ys, color="black", linewidth=1.2, linestyle="-" if rate == top else "--")
        text = f"products, {dtype}: {rate / 1e9:.0f} GFLOP/s"
        axes.annotate(text, (right, rate / 1e9), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=9)
    at = math.sqrt(left * top / ceilings.bandwidth)  # halfway up the slope
    text = f"copies of {ceilings.copied / 1e6:.0f} MB: {ceilings.bandwidth / 1e9:.1f} GB/s"
    axes.annotate(text, (at, at * ceilings.bandwidth / 1e9), xytext=(10, -4), textcoords="offset points", fontsize=9)

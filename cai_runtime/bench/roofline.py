"""Draws a roofline plot (Williams, Waterman and Patterson 2009): measurements under the two roofs of the machine.

x axis: operations per byte of stored weights. y axis: operations per second. The slanted roof is the measured read
bandwidth, the flat roof the measured matrix rate. A point on a roof runs at its floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    from cai_runtime.bench.roofs import Roofs

# Okabe and Ito's colours (2008), distinct for colour-blind readers, one per kernel. Greys are for torch.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS = ("#444444", "#888888", "#bbbbbb")
MARKERS = {"fp32": "s", "bf16": "D", "fp16": "P", "int8": "o", "int4": "^"}


@dataclass(frozen=True)
class Point:
    """One measurement. rows: of the input. intensity: operations per byte. rate: operations per second."""

    kernel: str
    store: str
    rows: int
    intensity: float
    rate: float


def check_plot(path: Path) -> None:
    """Raise BenchmarkError, before any measurement, if the plot could not be written."""
    if find_spec("matplotlib") is None:
        raise BenchmarkError("--plot needs matplotlib, which is not installed: pip install 'cai-runtime[bench]'")
    if path.suffix.lower() != ".png":
        raise BenchmarkError(f"--plot {path}: the plot is a PNG; name a file that ends in .png")
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"--plot {path}: there is no directory {path.absolute().parent}")


def plot_roofline(path: Path, points: Sequence[Point], roofs: Roofs, *, title: str, subtitle: str) -> None:
    """Write the plot as PNG. Raises BenchmarkError if there is no point, and as `check_plot`."""
    check_plot(path)
    if not points:
        raise BenchmarkError("nothing was measured, so there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=150)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.085, 0.735, 0.815))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    left = min(p.intensity for p in points) / 2
    right = max(12 * max(p.intensity for p in points), 12 * roofs.flops / roofs.read)  # room for the roofs' labels
    low = min(p.rate for p in points) / 1e9 / 1.6
    axes.set_xlim(left, right)
    axes.set_ylim(low, max(roofs.flops, *(p.rate for p in points)) / 1e9 * 1.5)
    _draw_roofs(axes, roofs, left, right)
    colours = _colours(points)
    largest = max(p.rows for p in points)
    # torch's points are hollow, so that ours remain visible below them.
    for p in points:
        hollow = _is_peer(p.kernel)
        colour = colours[p.kernel]
        axes.scatter(
            p.intensity, p.rate / 1e9, s=_area(p.rows, largest), marker=MARKERS[p.store],
            facecolors="none" if hollow else colour, edgecolors=colour if hollow else "white",
            linewidths=1.2 if hollow else 0.6, alpha=0.9, zorder=4 if hollow else 3,
        )  # fmt: skip
    _legends(figure, points, colours, largest)
    axes.set_xlabel("operations per byte of stored weights")
    axes.set_ylabel("GFLOP/s")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(which="major", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(0, 1.015, subtitle, transform=axes.transAxes, fontsize="small", color="#555555")
    canvas.print_png(str(path))


def _draw_roofs(axes: Any, roofs: Roofs, left: float, right: float) -> None:
    """The two roofs and, thinner, the matrix rates of the other dtypes."""
    ridge = roofs.flops / roofs.read
    axes.plot(
        [left, ridge, right], [left * roofs.read / 1e9, roofs.flops / 1e9, roofs.flops / 1e9], color="black", linewidth=1.6,
        zorder=2,
    )  # fmt: skip
    start = max(left, axes.get_ylim()[0] * 1e9 / roofs.read)
    at = start * 1.25
    axes.annotate(
        f"reads {roofs.read / 1e9:,.1f} GB/s", (at, at * roofs.read / 1e9), xytext=(-4, 6), textcoords="offset points",
        rotation=_slope(axes, at, roofs.read), rotation_mode="anchor", fontsize="small",
    )  # fmt: skip
    for name, rate in roofs.matmul.items():
        if rate != roofs.flops:
            axes.plot(
                [rate / roofs.read, right], [rate / 1e9] * 2, color="black", linewidth=1, linestyle="--", zorder=2
            )
        axes.annotate(
            f"{name} matrices {rate / 1e9:,.0f} GFLOP/s", (right, rate / 1e9), xytext=(-2, 4), textcoords="offset points",
            ha="right", fontsize="small",
        )  # fmt: skip


def _slope(axes: Any, x: float, read: float) -> float:
    """The angle of the slanted roof on the page, in degrees."""
    import math

    (x0, y0), (x1, y1) = (axes.transData.transform((t, t * read / 1e9)) for t in (x, 2 * x))
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _colours(points: Sequence[Point]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for kernel in dict.fromkeys(p.kernel for p in points):
        theirs = _is_peer(kernel)
        used = sum(_is_peer(name) == theirs for name in colours)
        palette = GREYS if theirs else COLOURS
        colours[kernel] = palette[used % len(palette)]
    return colours


def _is_peer(kernel: str) -> bool:
    return kernel.startswith("torch")


def _area(rows: int, largest: int) -> float:
    """A marker's area in square points: larger for more rows."""
    import math

    return 26 + 60 * (math.log2(rows) / math.log2(largest) if largest > 1 else 0)


def _legends(figure: Any, points: Sequence[Point], colours: dict[str, str], largest: int) -> None:
    """Colours are kernels, shapes are stores, sizes are rows."""
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str, colour: str, area: float, hollow: bool = False) -> Any:
        return Line2D(
            [], [], linestyle="", marker=marker, markeredgecolor=colour, markerfacecolor="none" if hollow else colour,
            markersize=area**0.5, label=label,
        )  # fmt: skip

    stores = [store for store in MARKERS if any(p.store == store for p in points)]
    rows = sorted({p.rows for p in points})
    sections = [
        ("kernel", [entry(name, "o", colour, 50, _is_peer(name)) for name, colour in colours.items()]),
        ("store", [entry(store, MARKERS[store], "#333333", 45) for store in stores]),
        ("rows", [entry(f"{n}", "o", "#aaaaaa", _area(n, largest)) for n in rows]),
    ]
    top = 0.9
    for title, handles in sections:
        figure.legend(
            handles=handles, title=title, loc="upper left", bbox_to_anchor=(0.815, top), frameon=False, fontsize="small",
            alignment="left", borderaxespad=0.0,
        )  # fmt: skip
        top -= 0.065 + 0.031 * len(handles)

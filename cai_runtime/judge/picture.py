"""Draws a checkpoint and a comparison as PNG.

matplotlib is imported on the first drawing, and no global state of it changes: no pyplot, backend or style.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import CompressionError
from cai_runtime.slim.provenance import ModuleErrors, number, quality_lines, stage_seconds

if TYPE_CHECKING:
    from cai_runtime.judge.comparison_result import Comparison
    from cai_runtime.slim.inspect import Inspection, ModuleRow

# Okabe and Ito's colours, distinct for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
MARKERS = {"interpolative": "o", "lowrank": "s", "mpo": "D", "dense": "^"}
GREY = "#666666"
COLUMNS = 8  # most projections drawn; beyond that, those with the most bytes
SMALL = 8  # points


def check_picture(path: Path) -> None:
    """Raise CompressionError, before any work, if the picture could not be written."""
    if find_spec("matplotlib") is None:
        raise CompressionError("--picture needs matplotlib, which is not installed: pip install 'cai-runtime[plot]'")
    if path.suffix.lower() != ".png":
        raise CompressionError(f"--picture {path}: the picture is a PNG; name a file that ends in .png")
    if not path.absolute().parent.is_dir():
        raise CompressionError(f"--picture {path}: there is no directory {path.absolute().parent}")


# ------------------------------------------------------------------------------------------------------ one checkpoint


@dataclass(frozen=True)
class Projection:
    """The modules of one name in all layers. depths: the layer's number, None outside layers."""

    label: str
    rows: tuple[ModuleRow, ...]
    depths: tuple[int | None, ...]

    @property
    def in_layers(self) -> bool:
        return None not in self.depths

    @property
    def nbytes(self) -> int:
        return sum(row.spec.nbytes for row in self.rows)


def projections(rows: Iterable[ModuleRow]) -> list[Projection]:
    """Group the listed modules by name without numbers, in order. A depth is the first number in a name; an embedding has
    none."""
    groups: dict[str, list[ModuleRow]] = {}
    for row in rows:
        if row.listed:
            pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
            groups.setdefault(pattern, []).append(row)
    last = [pattern.rpartition(".")[2] for pattern in groups]
    found = []
    for pattern, own in groups.items():
        short = pattern.rpartition(".")[2]
        label = short if last.count(short) == 1 else pattern.partition("*.")[2] or pattern
        depths = [next((int(part) for part in row.name.split(".") if part.isdigit()), None) for row in own]
        found.append(Projection(label, tuple(own), tuple(depths)))
    return found


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Draw rank, keep and error of every module over depth, one column per projection, bytes by projection and time by
    stage.

    Raises CompressionError as `check_picture`, and for a dense checkpoint.
    """
    check_picture(path)
    found = projections(inspection.modules)
    if not found:
        raise CompressionError(f"{inspection.path} is a dense checkpoint: there is no rank or keep to draw")
    layered = [p for p in found if p.in_layers] or found
    shown = sorted(sorted(layered, key=lambda p: -p.nbytes)[:COLUMNS], key=found.index)
    deepest = max((depth or 0) for p in shown for depth in p.depths)
    errors = ModuleErrors.of(inspection.report).by_name
    colours = _store_colours(row for projection in found for row in projection.rows)
    quantities = ["rank", "keep (parameters)"] + (["relative error"] if errors else [])
    seconds = stage_seconds(inspection.report)

    figure, canvas = _figure(max(2.0 + 1.55 * len(shown), 8.0), 2.1 * len(quantities) + 3.9)
    outer = figure.add_gridspec(
        2, 1, height_ratios=(2.1 * len(quantities), 2.3), left=0.075, right=0.985, top=0.885, bottom=0.07, hspace=0.19
    )
    grid = outer[0].subgridspec(len(quantities), len(shown), wspace=0.1, hspace=0.12)
    for line, quantity in enumerate(quantities):
        left = None
        for column, projection in enumerate(shown):
            axes = figure.add_subplot(grid[line, column], sharey=left)
            left = left or axes
            axes.set_xlim(-0.04 * max(deepest, 1), 1.04 * max(deepest, 1))
            _draw_projection(axes, projection, quantity, errors, colours)
            axes.tick_params(labelleft=column == 0, labelbottom=line == len(quantities) - 1)
            if line == 0:
                axes.set_title(projection.label, fontsize=SMALL + 1)
            if column == 0:
                axes.set_ylabel(quantity, fontsize=SMALL)
            if line == len(quantities) - 1:
                axes.set_xlabel("layer", fontsize=SMALL)
    below = outer[1].subgridspec(1, 2 if seconds else 1, wspace=0.28, width_ratios=(1.7, 1) if seconds else (1,))
    _draw_bytes(figure.add_subplot(below[0]), inspection, found, colours)
    if seconds:
        _draw_seconds(figure.add_subplot(below[1]), seconds)
    _inspection_title(figure, inspection, len(layered) - len(shown))
    _inspection_legend(figure, found, colours)
    _save(canvas, path)


def _draw_projection(
    axes: Any, projection: Projection, quantity: str, errors: dict[str, float], colours: dict[str, str]
) -> None:
    points = []
    for depth, row in zip(projection.depths, projection.rows, strict=True):
        spec = row.spec
        full = min(spec.out_features, spec.in_features)
        if quantity == "rank":
            value: float | None = max(spec.rank) if isinstance(spec.rank, tuple) else spec.rank or full
        elif quantity == "relative error":
            value = errors.get(row.name) or None  # None for a module left dense: a log axis has no 0
        else:
            value = spec.keep_parameters
        if value is not None:
            points.append((depth or 0, value, MARKERS[spec.kind], colours[_store(row)]))
    if len({depth for depth, *_ in points}) == len(points):
        ordered = sorted(points)
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], color="#cccccc", linewidth=0.8, zorder=1)
    for marker, colour in sorted({(marker, colour) for _, _, marker, colour in points}):
        own = [(depth, value) for depth, value, m, c in points if (m, c) == (marker, colour)]
        axes.scatter(*zip(*own, strict=True), s=11, marker=marker, color=colour, linewidths=0, zorder=2)
    if quantity == "rank":
        spec = projection.rows[0].spec
        axes.axhline(min(spec.out_features, spec.in_features), color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    if quantity == "keep (parameters)":
        axes.axhline(1.0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    if quantity == "relative error":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _plain(axes)


def _draw_bytes(axes: Any, inspection: Inspection, found: Sequence[Projection], colours: dict[str, str]) -> None:
    """Draw the bytes of each projection, of the unlisted dense modules and of the rest. Hollow bars: the same in bf16."""
    bars: list[tuple[str, list[tuple[int, str]], int]] = []
    for projection in found:
        parts: dict[str, int] = {}
        for row in projection.rows:
            colour = colours[_store(row)]
            parts[colour] = parts.get(colour, 0) + row.spec.nbytes
        dense = sum(row.spec.dense_nbytes for row in projection.rows)
        bars.append((projection.label, [(n, c) for c, n in parts.items()], dense))
    bars += [
        (row.name.rpartition(".")[2], [(row.spec.nbytes, GREY)], row.spec.dense_nbytes)
        for row in inspection.modules
        if not row.listed
    ]
    if len(bars) > 14:
        bars = sorted(bars, key=lambda bar: -sum(n for n, _ in bar[1]))[:14]
    if inspection.other_nbytes:
        bars.append(("other tensors", [(inspection.other_nbytes, GREY)], 2 * inspection.other_parameters))
    for place, (_, own, dense) in enumerate(bars):
        axes.barh(place, dense / 1e6, height=0.78, facecolor="none", edgecolor="#aaaaaa", linewidth=0.8, zorder=1)
        start = 0.0
        for nbytes, colour in own:
            axes.barh(place, nbytes / 1e6, left=start / 1e6, height=0.6, color=colour, zorder=2)
            start += nbytes
        share = start / inspection.nbytes
        axes.annotate(
            f" {share:.1%}", (max(start, dense) / 1e6, place), va="center", fontsize=SMALL - 1, color=GREY, zorder=3
        )
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("MB (hollow: dense in bf16; %: share of the checkpoint)", fontsize=SMALL)
    _plain(axes, grid="x")


def _draw_seconds(axes: Any, seconds: dict[str, float]) -> None:
    axes.barh(range(len(seconds)), list(seconds.values()), height=0.6, color=COLOURS[4], zorder=2)
    for place, took in enumerate(seconds.values()):
        axes.annotate(f" {took:,.1f}", (took, place), va="center", fontsize=SMALL - 1, color=GREY)
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("seconds by stage", fontsize=SMALL)
    _plain(axes, grid="x")


def _inspection_title(figure: Any, inspection: Inspection, left_out: int) -> None:
    kept = inspection.kept
    assert kept is not None
    keep = (inspection.report or {}).get("keep")
    of_report = [number(keep.get(key)) for key in ("parameters", "bytes")] if isinstance(keep, dict) else []
    told = [f"{kept.modules} listed modules, {inspection.nbytes / 1e6:,.1f} MB"]
    if len(of_report) == 2 and None not in of_report:
        told.append(f"linear layers: keep {of_report[0]:.3f} in parameters, {of_report[1]:.3f} in bytes of bf16")
    else:
        told.append(f"keep {kept.keep_parameters:.3f} in parameters, {kept.keep_bytes:.3f} in bytes of bf16")
    quality = (inspection.report or {}).get("quality")
    if isinstance(quality, dict):
        told += quality_lines(quality)[:3]
    if left_out:
        told.append(f"{left_out} smaller projections not drawn over depth")
    figure.text(0.075, 0.965, inspection.path.resolve().name, fontweight="bold", fontsize=SMALL + 4)
    figure.text(0.075, 0.938, "; ".join(told), fontsize=SMALL, color=GREY)


def _inspection_legend(figure: Any, found: Sequence[Projection], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in MARKERS if any(row.spec.kind == kind for p in found for row in p.rows)]
    handles = [Line2D([], [], marker="o", linestyle="", color=c, markersize=5, label=s) for s, c in colours.items()]
    handles += [
        Line2D([], [], marker=MARKERS[kind], linestyle="", color="black", markersize=5, label=kind) for kind in kinds
    ]
    handles.append(Line2D([], [], linestyle=":", color=GREY, label="full rank; keep 1"))
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.99, 0.995), ncols=len(handles), fontsize=SMALL,
        frameon=False, handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip


def _store(row: ModuleRow) -> str:
    return "+".join(dict.fromkeys(row.spec.store))


def _store_colours(rows: Iterable[ModuleRow]) -> dict[str, str]:
    stores = dict.fromkeys(_store(row) for row in rows)
    return {store: COLOURS[k % len(COLOURS)] for k, store in enumerate(stores)}


# ------------------------------------------------------------------------------------------------------ a comparison


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw each window's nats, of one model against the other's, KL's distribution over positions, and KL along a window.

    For one model, or two with different vocabularies, only each window's nats. Raises CompressionError as
    `check_picture`.
    """
    check_picture(path)
    windows = comparison.windows
    divergence = comparison.divergence
    figure, canvas = _figure(11.0 if divergence else 5.5, 4.2)
    panels = 3 if divergence else 1
    grid = figure.add_gridspec(
        1, panels, left=0.07 if divergence else 0.12, right=0.985, top=0.8, bottom=0.13, wspace=0.3
    )
    first, second = windows["reference_nats"], windows.get("candidate_nats")
    axes = figure.add_subplot(grid[0])
    if divergence is None or second is None:
        for name, values, colour in (("reference", first, COLOURS[0]), ("candidate", second or [], COLOURS[1])):
            if values:
                axes.plot(range(1, len(values) + 1), values, "o", markersize=4, color=colour, label=name)
        axes.set_xlabel("window of the text", fontsize=SMALL)
        axes.set_ylabel("nats per token", fontsize=SMALL)
        if second:
            axes.legend(fontsize=SMALL, frameon=False)
    else:
        _draw_windows(axes, first, second)
        _draw_kl_distribution(figure.add_subplot(grid[1]), comparison)
        _draw_kl_along(figure.add_subplot(grid[2]), comparison)
    for panel in figure.axes:
        _plain(panel)
    _comparison_title(figure, comparison)
    _save(canvas, path)


def _draw_windows(axes: Any, first: Sequence[float], second: Sequence[float]) -> None:
    low, high = min(*first, *second) - 0.1, max(*first, *second) + 0.1
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=":", label="equal")
    axes.scatter(first, second, s=16, color=COLOURS[0], linewidths=0, zorder=2, label="a window of the text")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("reference, nats per token", fontsize=SMALL)
    axes.set_ylabel("candidate, nats per token", fontsize=SMALL)
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left")


def _draw_kl_distribution(axes: Any, comparison: Comparison) -> None:
    import numpy as np

    values = np.sort(np.concatenate(comparison.position_kl))
    values = np.maximum(values, 1e-7)
    above = 1.0 - np.arange(len(values)) / len(values)
    axes.loglog(values, above, color=COLOURS[0], linewidth=1.4)
    assert comparison.divergence is not None
    axes.axvline(comparison.divergence.kl, color=COLOURS[5], linewidth=1, label=f"mean {comparison.divergence.kl:.3g}")
    for name, value in comparison.divergence.kl_quantiles.items():
        axes.plot([value], [1 - float(name)], "o", color=COLOURS[0], markersize=4)
        axes.annotate(f"{float(name):.0%}: {value:.2g}", (value, 1 - float(name)), xytext=(5, 3),
                      textcoords="offset points", fontsize=SMALL - 1)  # fmt: skip
    axes.set_xlabel("KL at a position, nats", fontsize=SMALL)
    axes.set_ylabel("share of positions above", fontsize=SMALL)
    axes.legend(fontsize=SMALL, frameon=False, loc="lower left")


def _draw_kl_along(axes: Any, comparison: Comparison) -> None:
    """Draw mean KL over the position in a window, averaged over runs of positions into about 24 points."""
    import numpy as np

    longest = max(len(kl) for kl in comparison.position_kl)
    run = max(longest // 24, 1)
    places, means, errors = [], [], []
    for start in range(0, longest, run):
        own = [float(kl[start : start + run].mean()) for kl in comparison.position_kl if len(kl) > start]
        places.append(start + run / 2)
        means.append(float(np.mean(own)))
        errors.append(float(np.std(own, ddof=1) / len(own) ** 0.5) if len(own) > 1 else 0.0)
    axes.errorbar(places, means, yerr=errors, fmt="o-", color=COLOURS[0], markersize=3, linewidth=1, elinewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place in the window, tokens", fontsize=SMALL)
    axes.set_ylabel("mean KL, nats (± one standard error)", fontsize=SMALL)


def _comparison_title(figure: Any, comparison: Comparison) -> None:
    models = [m for m in (comparison.reference, comparison.candidate) if m is not None]
    names = " and ".join(Path(m.path).name for m in models)
    told = "; ".join(f"{m.nbytes / 1e6:,.1f} MB, perplexity {m.perplexity:.2f}" for m in models)
    d = comparison.divergence
    if d is not None:
        told += f": {d.ratio:.3f} x; KL {d.kl:.4f} nats per token; top-1 agreement {d.top1:.1%}"
    text = comparison.text
    about = f"{text['source']}; {text['tokens']:,} tokens in {text['windows']} windows; {comparison.backend}"
    x = 0.07 if d else 0.12
    figure.text(x, 0.94, names, fontweight="bold", fontsize=SMALL + 2)
    figure.text(x, 0.89, told, fontsize=SMALL)
    figure.text(x, 0.845, about, fontsize=SMALL, color=GREY)


# ------------------------------------------------------------------------------------------------------ both


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    return figure, FigureCanvasAgg(figure)


def _plain(axes: Any, grid: str = "y") -> None:
    axes.grid(axis=grid, which="major", color="#e4e4e4", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL - 1, length=2.5)


def _save(canvas: Any, path: Path) -> None:
    try:
        canvas.print_png(str(path))
    except OSError as e:
        raise CompressionError(f"--picture {path} can't be written: {e.strerror or e}") from e

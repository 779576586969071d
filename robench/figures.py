"""Figures, drawn without a display and without matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from robench.estimate import Estimate
from robench.files import write_atomic

# Okabe and Ito's colours, told apart by colour-blind readers; line styles double them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


def accuracy_curves(
    curves: Mapping[str, Sequence[tuple[float, Estimate]]], path: Path, *, title: str, budget: str, logarithmic: bool = False
) -> None:
    """Draw robust accuracy against the attack's budget, one line per defense with its 95 % band, and write it as PNG or SVG.

    Args:
        curves: by defense, or whatever a line stands for, points (budget, estimate) with rising budgets.
        path: the file; its suffix says the format.
        title: of the figure.
        budget: the horizontal axis's label, with the budget's unit.
        logarithmic: whether that axis is; its budgets are positive then.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        budgets = [b for b, _ in points]
        axes.plot(budgets, [100 * e.value for _, e in points], style, color=colour, marker="o", markersize=3, label=name)
        if len(points) == 1:
            # A band has no width there.
            axes.vlines(budgets, [100 * e.low for _, e in points], [100 * e.high for _, e in points], color=colour, alpha=0.5, lw=1)
        axes.fill_between(budgets, [100 * e.low for _, e in points], [100 * e.high for _, e in points], color=colour, alpha=0.12, lw=0)
    axes.set(xlabel=budget, ylabel="accuracy under attack (%)", ylim=(0, 100))
    axes.set_title(title, loc="left", fontsize=10)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def perturbation(delta: Tensor, path: Path, *, title: str) -> None:
    """Draw a perturbation (C, H, W), grey where it changes nothing and stretched to the full range, and write it as PNG or SVG.

    Args:
        delta: the perturbation, in units of the pixel range, of 1 or 3 channels.
        path: the file; its suffix says the format.
        title: of the figure.
    """
    largest = float(delta.abs().max())
    shown = (0.5 + delta.cpu().permute(1, 2, 0) / (2 * largest or 1)).clamp(0, 1).numpy()
    figure = Figure(figsize=(4.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shown if shown.shape[2] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{title}\nlargest change {255 * largest:.1f} / 255", fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    # A fixed salt and no date make the same figure the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "robench"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue())

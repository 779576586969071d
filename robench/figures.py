"""Figures, drawn without a display and without matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robench.estimate import Estimate
from robench.files import write_atomic

# Okabe and Ito's colours, told apart by colour-blind readers; line styles double them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


def accuracy_curves(curves: Mapping[str, Sequence[tuple[float, Estimate]]], path: Path, *, title: str, budget: str) -> None:
    """Draw robust accuracy against the attack's budget, one line per defense with its 95 % band, and write it as PNG or SVG.

    Args:
        curves: by defense, points (budget, estimate) with rising budgets.
        path: the file; its suffix says the format.
        title: of the figure.
        budget: the horizontal axis's label, with the budget's unit.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        budgets = [b for b, _ in points]
        axes.plot(budgets, [100 * e.value for _, e in points], style, color=colour, marker="o", markersize=3, label=name)
        axes.fill_between(budgets, [100 * e.low for _, e in points], [100 * e.high for _, e in points], color=colour, alpha=0.12, lw=0)
    axes.set(xlabel=budget, ylabel="accuracy under attack (%)", ylim=(0, 100))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    buffer = io.BytesIO()
    # A fixed salt and no date make the same figure the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "robench"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue())

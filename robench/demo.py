"""The demo: claims of all three papers settled on the embedded digits, in about two minutes on two cores."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from robench import claim, leaderboard, verdicts
from robench.attacks import registered
from robench.errors import UserError
from robench.figures import accuracy_curves
from robench.record import clean_estimate, robust_estimate
from robench.workbench import Workbench
from robench.zoo import entries

DATASET = "digits"
CURVE = ("natural", "ensemble2", "single_adv", "ensemble2_adv", "separate2_adv", "robust_average,k=4,eps=1", "composite,eps=2,alpha=0.2",
         "multires_self_ensemble")  # fmt: skip
LEVELS = (16, 32, 48, 64)
"""Linf budgets of the figure, in 255ths of the pixel range."""


def run(*, out: Path, cache: Path | None = None, echo: Callable[[str], None]) -> int:
    """Train a small cast of defenses, attack them, settle every claim made on digits, and leave records and a figure in `out`.

    What is trained and measured is kept in the cache, so a second run takes seconds.

    Args:
        out: the folder for records, tables and the figure.
        cache: the cache folder.
        echo: is told each line of progress.

    Returns:
        0 if every claim came to the outcome that the project stands by, else 1.
    """
    bench = Workbench(DATASET, "smoke", cache=cache, keep=out / "records", progress=echo)
    settled = [
        claim.settle(c, DATASET, "smoke", bench.find) for c in claim.discover() for t in c.trials if (t.dataset, "smoke") in
        ((DATASET, scale) for scale in t.scales)
    ]  # fmt: skip
    if not settled:
        raise UserError("no claims are installed (entry point group robench.claims)")
    attack_versions = {name: attack.version for name, attack in registered().items()}
    rows = leaderboard.rows(
        bench.records, attack_versions=attack_versions, defense_versions={name: entry.version for name, entry in entries().items()}
    )
    figure = out / "accuracy_against_epsilon.png"
    draw_figure(bench, figure)
    console = Console(width=200)
    console.print(leaderboard.as_table(rows))
    console.print(verdicts.as_table(settled))
    console.print(f"records: {out / 'records'}   figure: {figure}", soft_wrap=True)
    return 0 if all(s.as_stood_by for s in settled) else 1


def draw_figure(bench: Workbench, path: Path) -> None:
    """Measure accuracy against epsilon for the cast and draw it."""
    curves = {}
    for name, attack in [*((name, "pgd-10") for name in CURVE), (CURVE[-1], "mean-transfer-10,draws=2")]:
        records = [bench.measured(name, f"Linf:{level}/255", attack, n=100) for level in LEVELS]
        points = [(0.0, clean_estimate(records[0])), *((level, robust_estimate(r)) for level, r in zip(LEVELS, records, strict=True))]
        curves[name if attack == "pgd-10" else f"{name},\nattacked through the mean of its heads"] = points
    title = "Digits, first 100 test images, PGD of 10 steps unless said otherwise. Upper bounds on robust accuracy, 95 % bands."
    accuracy_curves(curves, path, title=title, budget="Linf budget (255ths of the pixel range)")

"""The demo: claims of all three papers settled on the embedded digits, in two to three minutes on two cores."""

import concurrent.futures
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue

import torch
from rich.console import Console

from robench import attacks, claim, leaderboard, leaderboard_table, record, settlement, verdicts, zoo
from robench.accuracies import clean_estimate, robust_estimate
from robench.claim import STRONGEST, Accuracy, Claim
from robench.errors import UserError
from robench.record import Record
from robench.workbench import Workbench

DATASET = "digits"
CURVE = ("natural", "ensemble2", "single_adv", "ensemble2_adv", "separate2_adv", "robust_average,k=4,eps=1", "composite,eps=2,alpha=0.2",
         "multires_self_ensemble")  # fmt: skip
CLAIMS = ("robust-without-adversarial-training", "rivals-adversarial-training", "average-matches-stronger", "composite-keeps-robustness",
          "adversarial-training-beats-ensembling", "clean-ensemble-falls", "joint-beats-single", "joint-beats-separate")  # fmt: skip
"""What the demo settles: these need little beyond the figure's defenses. `pytest claims/ -m digits` settles all."""
LEVELS = (16, 32, 48)
"""Linf budgets of the figure, in 255ths of the pixel range."""


def run(*, out: Path, cache: Path | None = None, echo: Callable[[str], None]) -> int:
    """Train a small cast of defenses, attack them, settle the claims about them, and leave records and a figure in `out`.

    What is trained and measured is kept in the cache, so a second run takes seconds.

    Args:
        out: the folder for records, tables and the figure.
        cache: the cache folder.
        echo: is told each line of progress.

    Returns:
        0 if every claim came to the outcome that the project stands by, else 1.
    """
    claims = _claims()
    if not claims:
        raise UserError("no claims are installed (entry point group robench.claims)")
    torch.set_num_threads(1)
    known = record.load_folder(out / "records") if (out / "records").is_dir() else []
    bench = Workbench(DATASET, "smoke", records=known, cache=cache, keep=out / "records", ready_made=False)
    # All that follows is in the cache then.
    prepare(claims, bench, echo)
    figure = out / "accuracy_against_epsilon.png"
    # The figure's attacks count in the worst case too, so they come before the verdicts.
    draw_figure(bench, figure)
    settled = [settlement.settle(c, DATASET, "smoke", bench.find) for c in claims]
    rows = leaderboard.rows(
        [r for r in bench.records if r.dataset.n == len(bench.dataset)],
        attack_version=attacks.current_version,
        defense_versions={name: entry.version for name, entry in zoo.entries().items()},
    )
    console = Console(width=200)
    console.print(leaderboard_table.as_table(rows, zoo.short))
    console.print(verdicts.as_table(settled))
    console.print(f"records: {out / 'records'}   figure: {figure}", soft_wrap=True)
    return 0 if all(s.as_stood_by for s in settled) else 1


def _claims() -> list[Claim]:
    return [c for c in claim.discover() if c.name in CLAIMS]


def prepare(claims: Sequence[Claim], bench: Workbench, echo: Callable[[str], None]) -> None:
    """Train and attack into the cache what `bench` has no records of, a process for each defense, as many as there are cores.

    The networks are too small for one of them to keep two cores busy.
    """
    needed: dict[str, list[Accuracy]] = {name: [] for name in reversed(CURVE)}
    for c in claims:
        for _, accuracy in c.trial(DATASET, "smoke").quantity.terms:
            needed.setdefault(accuracy.defense, []).append(accuracy)
    needed = {name: accuracies for name, accuracies in needed.items() if not _known(bench, name, accuracies)}
    if not needed:
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        lines = manager.Queue()
        with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, 4), context) as pool:
            waiting = {pool.submit(_prepare_one, name, accuracies, bench.cache, lines) for name, accuracies in needed.items()}
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
                while not lines.empty():
                    echo(lines.get())
                for future in done:
                    future.result()


def _known(bench: Workbench, name: str, accuracies: Sequence[Accuracy]) -> bool:
    curve = [Accuracy(name, f"Linf:{level}/255", attack) for level in LEVELS for attack in curve_attacks(name).values()]
    drawn = name not in CURVE or all(settlement.matching(bench.records, a, DATASET, bench.scale, 0) for a in curve)
    return drawn and all(bench.settled_by_records(a, 0) for a in accuracies)


def _prepare_one(name: str, accuracies: Sequence[Accuracy], cache: Path | None, lines: "Queue[str]") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # The demo is the whole road, training included.
    bench = Workbench(DATASET, "smoke", cache=cache, ready_made=False, progress=lines.put)
    for accuracy in accuracies:
        bench.find(accuracy, 0)
    if name in CURVE:
        curve_records(bench, name)


def curve_attacks(name: str) -> dict[str, str]:
    """Return the attacks of a defense's curves by the text that the figure names each with."""
    if name != CURVE[-1]:
        return {name: "pgd-10"}
    # Those of its claims, so that their records and controls serve the figure too.
    terms = [accuracy for c in _claims() for _, accuracy in c.trial(DATASET, "smoke").quantity.terms]
    own = next(accuracy.attack for accuracy in terms if accuracy.defense == name and accuracy.attack)
    through_the_mean = STRONGEST["smoke"][1][0]
    return {
        f"{name},\nAPGD over {attacks.parse(own).parameters['draws']} draws": own,
        f"{name},\nattacked through the mean of its heads": through_the_mean,
    }


def curve_records(bench: Workbench, name: str) -> dict[str, list[Record]]:
    """Return the records of a defense's curves, by the same texts."""
    return {
        label: [bench.measured(name, f"Linf:{level}/255", attack, n=100) for level in LEVELS]
        for label, attack in curve_attacks(name).items()
    }


def draw_figure(bench: Workbench, path: Path) -> None:
    """Measure accuracy against epsilon for the cast and draw it."""
    # The processes that train have no use for matplotlib, which takes a second to import.
    from robench.figures import accuracy_curves

    curves = {}
    for name in CURVE:
        for label, records in curve_records(bench, name).items():
            points = zip(LEVELS, records, strict=True)
            curves[label] = [(0.0, clean_estimate(records[0])), *((level, robust_estimate(r)) for level, r in points)]
    title = "Digits, first 100 images or more, PGD-10 unless said otherwise. Upper bounds on robust accuracy, 95 % bands."
    accuracy_curves(curves, path, title=title, budget="Linf budget (255ths of the pixel range)")

"""Every defense of the zoo before `fast`, `adaptive` and the doctor, from the committed records and diagnoses.

`python leaderboard/render.py` writes it to leaderboard/zoo.md.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from robench import attacks, zoo
from robench.record import Record

ATTACKS = ("fast", "adaptive")
COLUMNS = ("defense", "threat", "clean", "fast", "adaptive", "broken by these alone", "doctor's attacks", "doctor's verdict", "because of")
SHOWN = 3
"""Compositions named, those that broke most first."""

Diagnosis = dict[str, Any]


def load_diagnoses(folder: Path) -> list[Diagnosis]:
    """Return what `robench doctor --json` wrote to a folder, by file name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def page(records: Sequence[Record], diagnoses: Sequence[Diagnosis]) -> str:
    """Return the page in GitHub's Markdown: a table for each data set and scale."""
    parts = [
        "# The zoo before `fast`, `adaptive` and the doctor",
        "Written from `leaderboard/records` and `leaderboard/doctor` by `make readme`. Accuracies are % of the first test images, "
        "robust ones upper bounds; of random defenses they are means over ten fresh draws. Beside `adaptive` are the compositions that "
        "broke most of the images that those before them had left, `fast` among them. "
        "The doctor's attacks are short and blunt, and its verdict is no proof: it says whether the signs of masked gradients are there.",
    ]
    places = sorted({(d["dataset"], d["scale"]) for d in diagnoses} | {(r.dataset.name, r.scale) for r in _of_attacks(records)})
    for dataset, scale in places:
        here = [r for r in _of_attacks(records) if (r.dataset.name, r.scale) == (dataset, scale)]
        examined = [d for d in diagnoses if (d["dataset"], d["scale"]) == (dataset, scale)]
        parts += [f"## {dataset}, {scale}", tabulate(_rows(here, examined), COLUMNS, "github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"


def _of_attacks(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r.attack.name in ATTACKS and r.defense.origin == "zoo"]


def copy_name(name: str, seed: int) -> str:
    """Return a defense's name, and which of its independently trained copies it is where it is not the first."""
    return f"{name} (seed {seed})" if seed else name


def _rows(records: Iterable[Record], diagnoses: Iterable[Diagnosis]) -> list[list[str]]:
    """Return a row for each trained defense within each threat model, in the zoo's order."""
    made: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        made.setdefault((copy_name(r.defense.name, r.defense.training_seed), r.threat, r.defense.weights_sha256), []).append(r)
    examined = {
        (copy_name(d["defense"]["name"], d["defense"]["training_seed"]), d["threat"], d["defense"]["weights_sha256"]): d for d in diagnoses
    }
    order = list(zoo.entries())
    subjects = sorted({*made, *examined}, key=lambda subject: (order.index(subject[0].partition(",")[0].partition(" ")[0]), subject))
    return [[*subject[:2], *_cells(made.get(subject, []), examined.get(subject))] for subject in subjects]


def _cells(records: Sequence[Record], diagnosis: Diagnosis | None) -> list[str]:
    found = {attack: _most(r for r in records if r.attack.name == attack) for attack in ATTACKS}
    clean = diagnosis["clean_accuracy"]["value"] if diagnosis else 0.0
    if largest := _most(records):
        clean = largest.clean_accuracy.value
    adaptive = found["adaptive"]
    doctor = [_share(diagnosis["robust_accuracy"]), diagnosis["verdict"], ", ".join(diagnosis["decided_by"])] if diagnosis else [""] * 3
    return [f"{100 * clean:.1f}", *map(_bound, found.values()), _broken_by(adaptive) if adaptive else "", *doctor]


def _most(records: Iterable[Record]) -> Record | None:
    """Return the record of the most examples, of an attack as it is by default rather than another."""
    return max(records, key=lambda r: (r.dataset.n, not _changed(r)), default=None)


def _changed(r: Record) -> list[str]:
    """Return an attack's parameters that are not its defaults, and its version if there is a later one."""
    usual, now = attacks.registered()[r.attack.name].defaults(), attacks.current_version(r.attack.name, r.defense.random)
    earlier = [f"version {r.attack.version}, now {now}"] if r.attack.version != now else []
    return [*(f"{key}={value}" for key, value in r.attack.parameters.items() if value != usual.get(key)), *earlier]


def _bound(r: Record | None) -> str:
    return "" if r is None else f"{100 * r.robust_accuracy.value:.1f} ({', '.join([f'n={r.dataset.n}', *_changed(r)])})"


def _share(share: dict[str, Any]) -> str:
    return f"{100 * share['value']:.1f} (n={share['n']})"


def _broken_by(r: Record) -> str:
    ranked = sorted(((count, name) for name, count in r.stages.items() if count), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {count}" for count, name in ranked[:SHOWN])

"""The leaderboard's renderings as Markdown, JSON and CSV, and the texts that they share with the page."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from robench.estimate import Estimate
from robench.leaderboard import EMPTY, NOTE, Row
from robench.record import Proportion

ROBUST, CLEAN, COST, VERDICTS, NOTES = "robust accuracy", "clean accuracy", "forwards/backwards per image", "verdicts", "notes"
HEADERS = (
    "defense",
    "data",
    "threat",
    ROBUST,
    CLEAN,
    "strongest attack",
    "attacks run",
    COST,
    "scale",
    "hardware",
    VERDICTS,
    NOTES,
)


def cells(row: Row) -> list[str]:
    """Return a row's texts, one for each of `HEADERS`."""
    record = row.strongest
    return [
        # Without the seed, independently trained copies would look alike.
        f"{record.defense.name} ({', '.join(row.copy)})",
        record.dataset.name,
        record.threat,
        row.bound,
        str(row.clean),
        record.attack.name,
        ", ".join(row.attacks),
        f"{_passes(record.cost.forwards)} / {_passes(record.cost.backwards)}",
        record.scale,
        record.hardware,
        "; ".join(map(str, row.verdicts)),
        "; ".join(row.notes),
    ]


def _passes(count: float) -> str:
    """Return passes per image as they are shown."""
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"


def as_markdown(leaderboard: Sequence[Row]) -> str:
    """Return the rows as a GitHub table with its note, or one line if there are none."""
    if not leaderboard:
        return EMPTY
    # A bar or a line break in a text would end its cell.
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in cells(row)] for row in leaderboard]
    return f"{tabulate(lines, headers=HEADERS, tablefmt='github', disable_numparse=True)}\n\n{NOTE}"


def as_json(leaderboard: Sequence[Row]) -> str:
    """Return ``{"note": ..., "rows": [...]}``: shares as fractions with intervals, attacks with all parameters."""
    return json.dumps({"note": NOTE, "rows": [_full(row) for row in leaderboard]}, indent=1)


def as_csv(leaderboard: Sequence[Row]) -> str:
    """Return a line for each row under a header line; shares are fractions, and ``; `` is between texts."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_CSV_HEADERS, *map(_columns, leaderboard)])
    return stream.getvalue()


def _share(estimate: Estimate | Proportion) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _full(row: Row) -> dict[str, Any]:
    record = row.strongest
    return {
        "defense": record.defense.model_dump(mode="json"),
        "dataset": record.dataset.name,
        "threat": record.threat,
        "scale": record.scale,
        "robust_accuracy": _share(row.robust),
        "clean_accuracy": _share(row.clean),
        "trustworthy": row.trustworthy,
        "strongest_attack": record.attack.name,
        "attacks": [
            r.attack.model_dump(mode="json") | {"seed": r.seed, "robust_accuracy": _share(r.robust_accuracy), "cost": r.cost.model_dump()}
            for r in row.records
        ],
        "cost": record.cost.model_dump(),
        "random_score": record.random_score and record.random_score.model_dump(mode="json"),
        "hardware": {"device": record.provenance.device, "processor": record.hardware},
        "verdicts": [str(finding) for finding in row.verdicts],
        "stale": list(row.stale),
        "notes": list(row.notes),
    }


_CSV_HEADERS = (
    "defense",
    "training_seed",
    "dataset",
    "threat",
    "scale",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "robust_n",
    "clean_accuracy",
    "clean_low",
    "clean_high",
    "clean_n",
    "strongest_attack",
    "attacks",
    "forwards_per_image",
    "backwards_per_image",
    "random_draws",
    "random_mean",
    "random_worst_draw",
    "hardware",
    "verdicts",
    "notes",
)


def _columns(row: Row) -> tuple[Any, ...]:
    record, score = row.strongest, row.strongest.random_score
    return (
        record.defense.name,
        record.defense.training_seed,
        record.dataset.name,
        record.threat,
        record.scale,
        *_share(row.robust).values(),
        *_share(row.clean).values(),
        record.attack.name,
        "; ".join(row.attacks),
        record.cost.forwards,
        record.cost.backwards,
        *((score.draws, score.mean.value, score.worst.value) if score else ("", "", "")),
        record.hardware,
        "; ".join(map(str, row.verdicts)),
        "; ".join(row.notes),
    )

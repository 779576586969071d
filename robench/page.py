"""The leaderboard as one HTML page that needs no server and no network: sorted and filtered where it is read."""

from collections.abc import Sequence
from typing import Any

import jinja2

from robench.estimate import Estimate
from robench.leaderboard import EMPTY, HEADERS, NOTE, Row, passes

FILTERS = ("dataset", "threat", "scale")


def as_html(leaderboard: Sequence[Row]) -> str:
    """Return the page. All texts are escaped; an address's ``#sort=3&order=descending&dataset=digits`` sorts and filters it."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("robench"), autoescape=True, undefined=jinja2.StrictUndefined)
    made = [_row(row) for row in leaderboard]
    filters = {label: sorted({str(row["filters"][label]) for row in made}) for label in FILTERS}
    template = environment.get_template("leaderboard.html")
    return template.render(note=NOTE, empty=EMPTY, headers=HEADERS, rows=made, filters=filters) + "\n"


def _row(row: Row) -> dict[str, Any]:
    record = row.strongest
    return {
        "filters": {"dataset": record.dataset.name, "threat": record.threat, "scale": record.scale},
        "defense": f"{record.defense.name} (seed {record.defense.training_seed})",
        "dataset": record.dataset.name,
        "threat": record.threat,
        "robust": _share(row.robust, row.bound) | {"untrusted": not row.trustworthy},
        "clean": _share(row.clean, str(row.clean)) | {"untrusted": False},
        "strongest": record.attack.name,
        "attacks": ", ".join(row.attacks),
        "cost": f"{passes(record.cost.forwards)} / {passes(record.cost.backwards)}",
        "passes": record.cost.forwards + record.cost.backwards,
        "scale": record.scale,
        "hardware": record.provenance.processor,
        "verdicts": row.verdicts,
        "notes": row.notes,
    }


def _share(estimate: Estimate, text: str) -> dict[str, Any]:
    return {"text": text, **{name: round(100 * getattr(estimate, name), 3) for name in ("value", "low", "high")}}

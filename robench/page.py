"""The leaderboard as one HTML page that needs no server and no network: sorted and filtered where it is read."""

from collections.abc import Sequence
from typing import Any

import jinja2

from robench.estimate import Estimate
from robench.leaderboard import EMPTY, NOTE, Row
from robench.leaderboard_formats import CLEAN, COST, HEADERS, NOTES, ROBUST, VERDICTS, cells

FILTERS = ("dataset", "threat", "scale")


def as_html(leaderboard: Sequence[Row]) -> str:
    """Return the page. All texts are escaped; an address's ``#sort=3&order=descending&dataset=digits`` sorts and filters it."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("robench"), autoescape=True, undefined=jinja2.StrictUndefined)
    made = [_row(row) for row in leaderboard]
    filters = {label: sorted({str(row["filters"][label]) for row in made}) for label in FILTERS}
    template = environment.get_template("leaderboard.html")
    return template.render(note=NOTE, empty=EMPTY, headers=HEADERS, rows=made, filters=filters) + "\n"


def _row(row: Row) -> dict[str, Any]:
    """Return the texts of `cells` by header, and what the page shows or sorts by in their place."""
    record = row.strongest
    return {
        "filters": {"dataset": record.dataset.name, "threat": record.threat, "scale": record.scale},
        "texts": dict(zip(HEADERS, cells(row), strict=True)),
        "shares": {ROBUST: _share(row.robust) | {"untrusted": not row.trustworthy}, CLEAN: _share(row.clean) | {"untrusted": False}},
        "numbers": {COST: record.cost.forwards + record.cost.backwards},
        "lists": {VERDICTS: list(map(str, row.verdicts)), NOTES: row.notes},
    }


def _share(estimate: Estimate) -> dict[str, Any]:
    return {name: round(100 * getattr(estimate, name), 3) for name in ("value", "low", "high")}

"""The table of verdicts: claim, the paper's number, ours with its interval, the verdict, and its status under the strongest attack."""

import json
from collections.abc import Iterable, Sequence

from rich.table import Table
from tabulate import tabulate

from robench import zoo
from robench.leaderboard import Finding, Findings
from robench.settlement import Settlement
from robench.threat import ThreatModel

COLUMNS = ("claim", "data, scale", "paper", "ours", "verdict", "strongest attack", "status")


def by_row(settlements: Iterable[Settlement]) -> Findings:
    """Return the settled claims for the rows of a leaderboard: each for every defense and threat model that it is about."""
    found: dict[tuple[str, str, str, str | None], list[Finding]] = {}
    for s in settlements:
        terms = [accuracy for _, accuracy in s.claim.trial(s.dataset, s.scale).quantity.terms]
        threats: set[str | None] = {str(ThreatModel.parse(accuracy.threat)) for accuracy in terms if accuracy.threat is not None}
        for name in {zoo.parse(accuracy.defense).text for accuracy in terms}:
            for threat in threats or {None}:
                found.setdefault((name, s.dataset, s.scale, threat), []).append(Finding(s.claim.name, s.verdict, s.status))
    return found


def cells(settlement: Settlement) -> list[str]:
    """Return one settlement's cells, in the order of `COLUMNS`."""
    return [
        settlement.claim.name, f"{settlement.dataset}, {settlement.scale}", settlement.claim.published, str(settlement.estimate),
        settlement.verdict, str(settlement.strongest), settlement.status,
    ]  # fmt: skip


def as_table(settlements: Sequence[Settlement]) -> Table:
    """Return the table for a terminal."""
    table = Table(title="verdicts", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column in ("verdict", "status"))
    for settlement in settlements:
        table.add_row(*cells(settlement))
    return table


def as_markdown(settlements: Sequence[Settlement]) -> str:
    """Return the table in GitHub's Markdown."""
    return str(tabulate([cells(s) for s in settlements], headers=COLUMNS, tablefmt="github", disable_numparse=True))


def as_json(settlements: Sequence[Settlement]) -> str:
    """Return the settlements as JSON, numbers as fractions."""
    return json.dumps([s.as_dict() for s in settlements], indent=1) + "\n"

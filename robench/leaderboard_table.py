"""The leaderboard for a terminal: a table for each threat model, with the notes under them."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robench.leaderboard import EMPTY, NOTE, Row
from robench.leaderboard_formats import CLEAN, ROBUST

COLUMNS = ("defense", ROBUST, CLEAN, "strongest attack", "claims", "notes")
STATUSES = {"holds": "hold", "broken": "broken", "open": "open"}
ELSEWHERE = "Each claim, all attacks, their cost and the hardware: --format md, html, json or csv."


def as_table(leaderboard: Sequence[Row], short: Callable[[str], str] = str) -> RenderableType:
    """Return the rows as tables for the terminal, or one line if there are none.

    Args:
        leaderboard: the rows, in the order of `robench.leaderboard.rows`.
        short: gives the name to show for a defense's full name.
    """
    if not leaderboard:
        return EMPTY
    numbers: dict[str, int] = {}
    parts: list[RenderableType] = []
    for place, group in groupby(leaderboard, key=_place):
        table = Table(title=place, title_justify="left", title_style="bold")
        for column in COLUMNS:
            # A name is folded, never cut short.
            table.add_column(column, overflow="fold")
        for row in group:
            marks = [numbers.setdefault(note, len(numbers) + 1) for note in row.notes]
            table.add_row(*map(Text, _cells(row, short)), ", ".join(map(str, marks)))
        parts += [table, ""]
    notes = [Text(f"{number}. {note}") for note, number in numbers.items()]
    return Group(*parts, *notes, *([""] if notes else []), Text(NOTE), Text(ELSEWHERE))


def _place(row: Row) -> str:
    record = row.strongest
    return f"{record.dataset.name}, {record.threat}, scale {record.scale}"


def _cells(row: Row, short: Callable[[str], str]) -> list[str]:
    record = row.strongest
    copy = f" ({', '.join(row.copy)})" if record.defense.training_seed or row.twin else ""
    counts = Counter(finding.status for finding in row.verdicts)
    claims = ", ".join(f"{counts[status]} {word}" for status, word in STATUSES.items() if counts[status])
    return [short(record.defense.name) + copy, row.bound, str(row.clean), record.attack.name, claims]

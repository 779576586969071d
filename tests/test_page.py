"""The leaderboard's page: what it holds, that texts cannot break it, and, in a real browser, that it sorts and filters."""

import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from robench.leaderboard import EMPTY, Finding, rows
from robench.leaderboard_formats import HEADERS, cells
from robench.page import as_html
from robench.record import Record

Build = Callable[..., Record]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """Collects the table's rows that are shown, cell by cell, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self._inside = ""
        self.feed(page)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self._inside = "" if "hidden" in dict(attrs) else "row"
            if self._inside:
                self.rows.append([])
        elif tag in ("td", "th") and self._inside:
            self._inside = "cell"
            self.rows[-1].append("")
        elif self._inside == "cell" and tag != "wbr":
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._inside:
            self._inside = "row"

    def handle_data(self, data: str) -> None:
        if self._inside == "cell":
            self.rows[-1][-1] += data


@pytest.fixture
def page(make_record: Build) -> str:
    return as_html(
        rows(
            [
                make_record([1, 1, 1, 0], defense={"name": "high"}, attack={"name": "fast"}, cost={"forwards": 12345.6, "backwards": 2.25}),
                make_record([0, 0, 0, 1], defense={"name": "low"}, threat="Linf:16/255"),
                make_record([0, 0, 1, 1], defense={"name": "<script>middle</script>"}),
            ],
            verdicts={("high", "digits", "smoke", "Linf:8/255"): [Finding("a claim", "reproduced", "holds")]},
        )
    )


def test_the_page_holds_every_row_with_its_interval(page: str) -> None:
    header, *found = Reader(page).rows
    assert header == list(HEADERS)
    assert [row[0] for row in found] == ["high (seed 0)", "<script>middle</script> (seed 0)", "low (seed 0)"]
    assert found[0][3] == "≤ 75.0 % [30.1, 95.4] (n=4)"
    assert found[0][7] == "12,346 / 2.2"
    assert found[0][10] == "1 a claim: reproduced, holds"


def test_the_page_says_what_the_table_says(make_record: Build) -> None:
    (row,) = made = rows([make_record([1, 0, 0.5], defense={"random": True})], verdicts={})
    (_, shown), texts = Reader(as_html(made)).rows, cells(row)
    assert shown[:-2] == texts[:-2]
    assert row.notes
    assert shown[-2:] == ["", f"{len(row.notes)} {' '.join(row.notes)}"]


def test_texts_are_escaped(page: str) -> None:
    assert Reader(page).tags.count("script") == 1
    assert "&lt;script&gt;middle" in page


def test_the_page_asks_nothing_of_any_network(page: str) -> None:
    assert "http" not in page
    assert "src=" not in page


def test_no_records_are_one_line() -> None:
    page = as_html([])
    assert EMPTY in page
    assert "table" not in Reader(page).tags


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open the page in")
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", ["high", "<script>middle</script>", "low"]),
        ("#sort=3&order=ascending", ["low", "<script>middle</script>", "high"]),
        ("#sort=0&order=descending", ["low", "high", "<script>middle</script>"]),
        ("#threat=Linf%3A16%2F255", ["low"]),
        ("#sort=99", ["high", "<script>middle</script>", "low"]),
    ],
)
def test_a_browser_sorts_and_filters_by_the_address(page: str, address: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [BROWSER or "", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/page.html{address}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert [row[0].removesuffix(" (seed 0)") for row in Reader(shown).rows[1:]] == expected

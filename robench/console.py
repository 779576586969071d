"""What the command line shows: progress, tables, lines of facts, and lists as JSON."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from robench import controls
from robench.accuracies import clean_estimate, robust_estimate
from robench.claim import Claim
from robench.plugins import Failure
from robench.record import Proportion, Record
from robench.settlement import Settlement
from robench.weights import Config
from robench.zoo import Entry, Paper

WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows a line of progress on stderr: in place on a terminal, else line by line."""
    if not sys.stderr.isatty():
        yield lambda line: click.echo(line, err=True)
        return
    with Console(stderr=True).status(Text("starting")) as status:
        yield lambda line: status.update(Text(line))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose cells are folded, never cut short."""
    made = Table()
    for header in headers:
        made.add_column(Text(header), overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def as_text(what: RenderableType) -> str:
    """Return what a terminal would show, in lines of up to `WIDTH` characters."""
    stream = io.StringIO()
    Console(file=stream, width=WIDTH).print(what)
    return stream.getvalue()


def show(what: RenderableType) -> None:
    """Print a table to stdout: as wide as the terminal, and wide enough to be read where there is none."""
    if sys.stdout.isatty():
        Console().print(what)
    else:
        click.echo(as_text(what), nl=False)


def show_facts(facts: Sequence[tuple[str, str]], err: bool = False) -> None:
    """Print a name and a value on each line, aligned."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}", err=err)


def outcome(r: Record) -> list[tuple[str, str]]:
    """Return the names and values that a record's reader wants first."""
    defense, score = r.defense, r.random_score
    facts = [
        ("defense", f"{defense.name} (version {defense.version}, seed {defense.training_seed}, members: {defense.members})"),
        ("data", f"{r.dataset.name} {r.dataset.split}, first {r.dataset.n}, scale {r.scale}"),
        ("attack", f"{r.attack.name} within {r.threat}, seed {r.seed}, {r.precision}"),
        ("clean accuracy", str(clean_estimate(r))),
        ("robust accuracy", f"≤ {robust_estimate(r)}"),
    ]
    if score is not None:
        readings = (("mean", score.mean), ("majority vote", score.majority), ("worst", score.worst))
        facts += [(f"  {name} of {score.draws} draws", _share(share)) for name, share in readings]
        if score.own_count is not None:
            by_stage = ", ".join(f"{stage} {100 * count / r.dataset.n:.1f} %" for stage, count in score.own_stages.items())
            facts.append(("  the attack's own count", f"{_share(score.own_count)}, after one wrong draw{by_stage and ': ' + by_stage}"))
    facts += [(f"  control, {name}", f"{100 * value:.1f} %") for name, value in r.controls.items()]
    facts += [(f"  first fooled by {name}", str(count)) for name, count in r.stages.items()]
    facts.append(("cost per image", f"{r.cost.forwards:,.1f} forwards, {r.cost.backwards:,.1f} backwards at the members"))
    facts.append(("time", f"{r.timing.seconds:,.1f} s on {r.provenance.device} ({r.hardware})"))
    facts += [("made in parts", r.parts)] if r.parts else []
    facts += [("partial", r.partial)] if r.partial else []
    failed = "; ".join(map(str, controls.failures(r)))
    if r.defense.random or failed:
        facts.append(("controls", f"failed: {failed}; another attack may leave far less" if failed else "passed"))
    return facts


def weights_facts(config: Config) -> list[tuple[str, str]]:
    """Return the names and values that tell shared weights apart."""
    return [
        ("defense", f"{config.defense} (version {config.version}, seed {config.seed})"),
        ("trained on", f"{config.dataset}, scale {config.scale}, {', '.join(dict.fromkeys(config.precision))}"),
        ("weights", f"SHA-256 {config.weights_sha256}"),
        *([("pulled from", config.source)] if config.source else []),
    ]


def zoo_table(entries: Mapping[str, Entry]) -> Table:
    """Return the defenses as a table, a defense and its aliases in one row."""
    headers = ("defense", "version", "paper", "parameters", "summary", "origin")
    rows = []
    for entry in entries.values():
        if entry.alias_of is None:
            settings = ", ".join(f"{key}={value}" for key, value in entry.defaults().items())
            names, paper = ", ".join([entry.name, *_aliases(entry, entries)]), entry.paper.arxiv or entry.paper.title
            rows.append([names, str(entry.version), paper, settings, entry.summary, entry.origin.partition(" (")[0]])
    return table(headers, rows)


def zoo_json(entries: Mapping[str, Entry], failures: Sequence[Failure]) -> str:
    """Return ``{"defenses": [...], "failures": [{"origin", "reason"}]}``."""
    defenses = [
        {
            "name": entry.name, "aliases": _aliases(entry, entries), "version": entry.version, "paper": _paper(entry.paper),
            "parameters": entry.defaults(), "summary": entry.summary, "origin": entry.origin,
        }
        for entry in entries.values() if entry.alias_of is None
    ]  # fmt: skip
    broken = [{"origin": failure.origin, "reason": failure.reason} for failure in failures]
    return json.dumps({"defenses": defenses, "failures": broken}, indent=1)


def claims_table(claims: Sequence[Claim], settled: Sequence[Settlement]) -> Table:
    """Return a row for each claim and data set, with its verdict and status at each scale."""
    rows = []
    for claim in claims:
        for trial in claim.trials:
            here = [s for s in settled if (s.claim.name, s.dataset) == (claim.name, trial.dataset) and s.scale in trial.scales]
            last = "; ".join(f"{s.scale}: {s.verdict}, {s.status}{'' if s.as_stood_by else ' (unexpected)'}" for s in here)
            source = f"{claim.paper.arxiv or claim.paper.title}, {claim.source}"
            texts = [claim.name, source, claim.statement, claim.published, trial.dataset, claim.protocol(trial.dataset, trial.scales[0])]
            rows.append([*texts, last or "not measured"])
    return table(("claim", "paper", "statement", "paper's number", "data", "protocol", "last verdict"), rows)


def claims_json(claims: Sequence[Claim], settled: Sequence[Settlement]) -> str:
    """Return a list of claims, each with its protocol by data set and what the records settle of it."""
    listed = [
        {
            "name": claim.name, "paper": _paper(claim.paper), "statement": claim.statement, "source": claim.source,
            "published": claim.published, "protocol": {trial.dataset: claim.protocol(trial.dataset) for trial in claim.trials},
            "verdicts": [s.as_dict() | {"as_stood_by": s.as_stood_by} for s in settled if s.claim.name == claim.name],
        }
        for claim in claims
    ]  # fmt: skip
    return json.dumps(listed, indent=1)


def _aliases(entry: Entry, entries: Mapping[str, Entry]) -> list[str]:
    return [other.name for other in entries.values() if other.alias_of == entry.name]


def _paper(paper: Paper) -> dict[str, Any]:
    return {"title": paper.title, "arxiv": paper.arxiv, "slug": paper.slug}


def _share(p: Proportion) -> str:
    return f"{100 * p.value:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}] (n={p.n})"

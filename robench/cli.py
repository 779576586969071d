"""The command line. Exit codes: 0 done, 1 a claim or check failed, 2 bad usage or input, 130 interrupted.

Commands import what they need, so that ``robench --help`` does not wait for torch.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robench.errors import UserError, nearest
from robench.files import cache_folder, write_atomic

if TYPE_CHECKING:
    from rich.console import RenderableType

    from robench.claim import Claim, Settlement
    from robench.record import Proportion, Record
    from robench.zoo import Entry, Scale

RECORDS = Path("leaderboard/records")
SEED = click.IntRange(0, 2**31 - 1)
PATH = click.Path(path_type=Path)


class _Main(click.Group):
    """A group whose every bad usage or input is one line on stderr."""

    def main(self, *args: Any, **settings: Any) -> Any:
        try:
            code = super().main(*args, **(settings | {"standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except (click.ClickException, UserError) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"robench: error: {' '.join(text.split())}", err=True)
            code = 2
        except click.Abort:
            click.echo("robench: interrupted; what was finished is kept in the cache", err=True)
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


_dataset = click.option("--dataset", default="digits", show_default=True, help="See `robench data list`.")
_scale = click.option("--scale", type=click.Choice(["smoke", "cpu", "gpu", "paper"]), help="[default: smoke for digits, else cpu]")
_device = click.option("--device", help="cpu, cuda or cuda:N. [default: cuda where there is one]")
_cache_dir = click.option("--cache-dir", type=PATH, help="Trained weights and unfinished work. [default: $ROBENCH_CACHE]")
_plugins = click.option("--plugin", "plugins", type=PATH, multiple=True, help="A Python file that registers defenses; repeatable.")


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robench", message="%(prog)s %(version)s")
def main() -> None:
    """Settle whether a defense's robustness claim holds."""


@main.command()
@click.option("--out", type=PATH, default=Path("robench-demo"), show_default=True, help="Folder for records, tables and figures.")
@_cache_dir
def demo(out: Path, cache_dir: Path | None) -> int:
    """Settle the claims on the embedded digits, in about two minutes."""
    from robench import demo

    cache = _writable(cache_folder(cache_dir))
    with _progress() as progress:
        return demo.run(out=_writable(out), cache=cache, echo=progress)


@main.group()
def zoo() -> None:
    """The defenses."""


@zoo.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_plugins
def zoo_list(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the defenses, where each comes from, and what failed to load and why."""
    from robench import zoo

    zoo.discover(plugins)
    entries = list(zoo.entries().values())
    aliases = {e.name: [a.name for a in entries if a.alias_of == e.name] for e in entries if e.alias_of is None}
    listed = [_described(e, aliases[e.name]) for e in entries if e.alias_of is None]
    if as_json:
        failures = [{"origin": failure.origin, "reason": failure.reason} for failure in zoo.failures()]
        click.echo(json.dumps({"defenses": listed, "failures": failures}, indent=1))
        return
    headers = ("defense", "version", "paper", "parameters", "summary", "origin")
    texts = [
        [", ".join([d["name"], *d["aliases"]]), str(d["version"]), f"{d['paper']['title']} {d['paper']['arxiv']}".strip(),
         ", ".join(f"{key}={value}" for key, value in d["parameters"].items()), d["summary"], d["origin"].partition(" (")[0]]
        for d in listed
    ]  # fmt: skip
    _print(_table(headers, texts))
    for failure in zoo.failures():
        click.echo(f"failed to load: {failure.origin}: {failure.reason}")


def _described(entry: "Entry", aliases: list[str]) -> dict[str, Any]:
    paper = {"title": entry.paper.title, "arxiv": entry.paper.arxiv, "slug": entry.paper.slug}
    return {
        "name": entry.name, "aliases": aliases, "version": entry.version, "paper": paper, "parameters": entry.defaults(),
        "summary": entry.summary, "origin": entry.origin,
    }  # fmt: skip


@main.command()
@click.argument("name")
@_dataset
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="Tells independently trained copies apart.")
@_device
@_cache_dir
@_plugins
def train(
    name: str, dataset: str, scale: "Scale | None", seed: int, device: str | None, cache_dir: Path | None, plugins: tuple[Path, ...]
) -> None:
    """Train a defense of the zoo; its weights are kept in the cache."""
    from robench import data, targets, training, workbench, zoo

    cache, device, scale = _writable(cache_folder(cache_dir)), _available(device), scale or workbench.default_scale(dataset)
    _load_plugins(plugins)
    named, split = zoo.parse(name), data.load(dataset, "test")
    with _progress() as progress:
        target = targets.trained(named, split, scale=scale, seed=seed, device=device, cache=cache, progress=progress)
    stages = [(stage, str(line)) for stage, line in (target.training or {}).items()] or [("training", "none is needed")]
    _print(_facts([
        ("defense", f"{target.name} (version {target.version}, seed {seed})"), ("trained on", f"{dataset}, scale {scale}, {device}"),
        *stages, ("weights", f"sha256 {training.state_hash(target.defense)}"), ("kept in", str(cache / "training")),
    ]))  # fmt: skip


@main.command()
@click.argument("target")
@_dataset
@click.option("--threat", default="Linf:8/255", show_default=True, help="Norm (Linf, L2, L1) and budget.")
@click.option("--attack", default="autoattack", show_default=True, help="Name and parameters: pgd-20,restarts=5.")
@click.option("--n", type=int, help="The first N test examples. [default: the scale's number]")
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="The attack's seed.")
@click.option("--training-seed", type=SEED, default=0, show_default=True, help="Which trained copy of a defense of the zoo.")
@click.option("--batch-size", type=click.IntRange(1), default=100, show_default=True, help="Examples attacked together.")
@_device
@_cache_dir
@_plugins
@click.option("--json", "json_path", metavar="FILE", help="Write the record to FILE, or with - alone to stdout.")
@click.option("--records", type=PATH, help="Save the record in this folder.")
def evaluate(
    target: str, dataset: str, threat: str, attack: str, n: int | None, scale: "Scale | None", seed: int, training_seed: int,
    batch_size: int, device: str | None, cache_dir: Path | None, plugins: tuple[Path, ...], json_path: str | None, records: Path | None,
) -> None:  # fmt: skip
    """Attack TARGET: a zoo name with parameters, robustbench:NAME, timm:NAME, or path/to/file.py:factory."""
    from robench import attacks, data, record, targets, threat as threats, workbench
    from robench.evaluate import measure

    # Whatever is wrong should show before anything is trained.
    threat_model, parsed_attack = threats.ThreatModel.parse(threat), attacks.parse(attack)
    cache, device, scale = _writable(cache_folder(cache_dir)), _available(device), scale or workbench.default_scale(dataset)
    folders = [records] if records else []
    for folder in [*folders, *([Path(json_path).parent] if json_path and json_path != "-" else [])]:
        _writable(folder)
    _load_plugins(plugins)
    split = data.load(dataset, "test")
    examples = split.first(min(len(split), workbench.EXAMPLES[scale]) if n is None else n)
    with _progress() as progress:
        resolved = targets.resolve(
            target, examples, threat_model, scale=scale, seed=training_seed, device=device, cache=cache, progress=progress
        )
        measured = measure(
            resolved, examples, threat_model, parsed_attack, seed=seed, batch_size=batch_size, device=device, scale=scale, cache=cache,
            progress=progress,
        )  # fmt: skip
    saved = [("record", str(record.save(measured, folder))) for folder in folders]
    if json_path and json_path != "-":
        write_atomic(Path(json_path), record.to_json(measured))
        saved.append(("json", json_path))
    _print(_facts([*_outcome(measured), *saved]), err=json_path == "-")
    if json_path == "-":
        click.echo(record.to_json(measured), nl=False)


def _outcome(r: "Record") -> list[tuple[str, str]]:
    """Return the lines of a record that a reader wants first."""
    from robench.record import clean_estimate, robust_estimate

    lines = [
        ("defense", f"{r.defense.name} (version {r.defense.version}, {r.defense.members} members, seed {r.defense.training_seed})"),
        ("data", f"{r.dataset.name} {r.dataset.split}, first {r.dataset.n}, scale {r.scale}"),
        ("attack", f"{r.attack.name} within {r.threat}, seed {r.seed}, {r.precision}"),
        ("clean accuracy", str(clean_estimate(r))),
        ("robust accuracy", f"≤ {robust_estimate(r)}"),
    ]
    if score := r.random_score:
        lines += [(f"  {name} of {score.draws} draws", _share(share)) for name, share in
                  (("mean", score.mean), ("majority vote", score.majority), ("worst", score.worst))]  # fmt: skip
    lines += [(f"  control, {name}", f"{value:.1%}") for name, value in r.controls.items()]
    lines.append(("cost per image", f"{r.cost.forwards:,.1f} forwards, {r.cost.backwards:,.1f} backwards at the members"))
    lines.append(("time", f"{r.timing.seconds:,.1f} s on {r.provenance.device} ({r.provenance.processor})"))
    return lines + ([("partial", r.partial)] if r.partial else [])


def _share(p: "Proportion") -> str:
    return f"{100 * p.value:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}] (n={p.n})"


@main.command()
@click.option("--format", "style", type=click.Choice(["table", "md", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=PATH, help="Write to this file instead of stdout.")
@click.option("--dataset", help="Only this data set.")
@click.option("--threat", help="Only this threat model.")
@click.option("--records", type=PATH, default=RECORDS, show_default=True, help="The folder of records.")
@_plugins
def leaderboard(style: str, out: Path | None, dataset: str | None, threat: str | None, records: Path, plugins: tuple[Path, ...]) -> None:
    """Rank what the records say of each defense."""
    from robench import attacks, leaderboard, record, zoo

    zoo.discover(plugins)
    rows = leaderboard.rows(
        record.load_folder(records), dataset=dataset, threat=threat,
        attack_versions={name: attack.version for name, attack in attacks.registered().items()},
        defense_versions={name: entry.version for name, entry in zoo.entries().items()},
    )  # fmt: skip
    if style == "table" and out is None:
        _print(leaderboard.as_table(rows))
        return
    renderings: dict[str, Callable[[], str]] = {
        "table": lambda: _text(leaderboard.as_table(rows)), "md": lambda: leaderboard.as_markdown(rows) + "\n",
        "json": lambda: leaderboard.as_json(rows) + "\n", "csv": lambda: leaderboard.as_csv(rows),
    }  # fmt: skip
    text = renderings[style]()
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--records", type=PATH, help=f"The folder of records that verdicts come from. [default: {RECORDS} if there]")
def claims(as_json: bool, records: Path | None) -> int:
    """List every claim: paper, number, protocol, last verdict."""
    from robench import claim, record

    known = record.load_folder(records or RECORDS) if records or RECORDS.is_dir() else []
    found, settled = claim.discover(), claim.settle_all(known)
    if as_json:
        click.echo(json.dumps([_claim(c, [s for s in settled if s.claim.name == c.name]) for c in found], indent=1))
    else:
        headers = ("claim", "paper", "statement", "paper's number", "data", "protocol", "last verdict")
        _print(_table(headers, [
            [c.name, f"{c.paper.arxiv or c.paper.title}, {c.source}", c.statement, c.published, t.dataset, c.protocol(t.dataset),
             "; ".join(f"{s.scale}: {s.verdict}, {s.status}" for s in settled if (s.claim.name, s.dataset) == (c.name, t.dataset))
             or "not measured"]
            for c in found for t in c.trials
        ]))  # fmt: skip
    return 0 if all(settlement.as_stood_by for settlement in settled) else 1


def _claim(c: "Claim", settled: Sequence["Settlement"]) -> dict[str, Any]:
    return {
        "name": c.name, "paper": {"title": c.paper.title, "arxiv": c.paper.arxiv, "slug": c.paper.slug}, "statement": c.statement,
        "source": c.source, "published": c.published, "protocol": {t.dataset: c.protocol(t.dataset) for t in c.trials},
        "verdicts": [s.as_dict() | {"as_stood_by": s.as_stood_by} for s in settled],
    }  # fmt: skip


@main.group()
def data() -> None:
    """The data sets."""


@data.command("list")
def data_list() -> None:
    """List the data sets and how to get those that are absent."""
    from robench import data

    for name, state in data.names():
        click.echo(f"{name}: {state}")


@data.command("add")
@click.argument("name")
@click.option("--from", "source", type=PATH, required=True, help="FOLDER/{train,test}/CLASS/IMAGE, or FOLDER/CLASS/IMAGE.")
def data_add(name: str, source: Path) -> None:
    """Add images of one's own as data set NAME."""
    from robench import data

    click.echo(f"{name} is in {data.add(name, source)}")


@data.command("fetch")
@click.argument("name")
def data_fetch(name: str) -> None:
    """Download cifar10 or cifar100."""
    from robench import data

    with _progress() as progress:
        folder = data.fetch(name, progress=progress)
    click.echo(f"{name} is in {folder}")


def _writable(folder: Path) -> Path:
    """Return the folder, having made sure that it can be written, which otherwise shows only after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"cannot use {folder} as a folder to write in: {error.strerror or error}") from error


def _available(device: str | None) -> str:
    """Return a device that this machine has."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device is None:
        return "cuda" if count else "cpu"
    if device not in known:
        raise UserError(f"this machine has no device {device!r} for torch; it has {', '.join(known)}{nearest(device, known)}")
    return device


def _load_plugins(plugins: tuple[Path, ...]) -> None:
    from robench import zoo

    zoo.discover(plugins)
    for failure in zoo.failures():
        click.echo(f"robench: warning: {failure.origin} failed to load: {failure.reason}", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows a line of progress: in place on a terminal, else as lines on stderr."""
    if not sys.stderr.isatty():
        yield lambda line: click.echo(line, err=True)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("starting")) as status:
        yield lambda line: status.update(Text(line))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(*(Text(header) for header in headers))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _facts(lines: Sequence[tuple[str, str]]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in lines:
        grid.add_row(Text(name), Text(value, overflow="fold"))
    return grid


def _text(what: "RenderableType") -> str:
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=200).print(what)
    return stream.getvalue()


def _print(what: "RenderableType", err: bool = False) -> None:
    """Print a table: as wide as the terminal, else wide enough to be read by line."""
    from rich.console import Console

    if (sys.stderr if err else sys.stdout).isatty():
        Console(stderr=err).print(what)
    else:
        click.echo(_text(what), nl=False, err=err)

"""The command line. Exit codes: 0 done, 1 a claim or check failed, 2 bad usage or input, 130 interrupted.

Commands import what they need, so that ``robench --help`` does not wait for torch.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robench.errors import UserError, nearest
from robench.files import cache_folder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from robench.zoo import Scale

RECORDS = Path("leaderboard/records")
SEED = click.IntRange(0, 2**31 - 1)
PATH = click.Path(path_type=Path)


class _Main(click.Group):
    """A group that reports bad usage and input in one line on stderr."""

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


_dataset = click.option("--dataset", default="digits", show_default=True, help="See: robench data list.")
_scale = click.option(
    "--scale", type=click.Choice(["smoke", "cpu", "gpu", "paper"]), help="Computation.  [default: smoke for digits, else cpu]"
)
_device = click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
_cache_dir = click.option("--cache-dir", type=PATH, help="Trained weights and unfinished work.  [default: $ROBENCH_CACHE]")
_plugins = click.option("--plugin", "plugins", type=PATH, multiple=True, help="A file that registers defenses; repeatable.")


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robench", message="%(prog)s %(version)s")
def main() -> None:
    """Settle whether a defense's robustness claim holds."""


@main.command()
@click.option("--out", type=PATH, default=Path("robench-demo"), show_default=True, help="Folder of the records and the figure.")
@_cache_dir
def demo(out: Path, cache_dir: Path | None) -> int:
    """Settle the claims on the embedded digits."""
    from robench import console, demo

    cache = _writable(cache_folder(cache_dir))
    with console.progress() as progress:
        return demo.run(out=_writable(out), cache=cache, echo=progress)


@main.group()
def zoo() -> None:
    """The defenses."""


@zoo.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_plugins
def zoo_list(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the defenses, where each comes from, and what failed to load and why."""
    from robench import console, zoo

    zoo.discover(plugins)
    if as_json:
        click.echo(console.zoo_json(zoo.entries(), zoo.failures()))
        return
    console.show(console.zoo_table(zoo.entries()))
    for failure in zoo.failures():
        click.echo(f"failed to load: {failure.origin}: {failure.reason}")


@main.command()
@click.argument("name")
@_dataset
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="Tells independently trained copies apart.")
@click.option("--fresh", is_flag=True, help="Train, though there are weights that were pulled or come with the zoo.")
@_device
@_cache_dir
@_plugins
def train(
    name: str, dataset: str, scale: "Scale | None", seed: int, fresh: bool, device: str | None, cache_dir: Path | None,
    plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Train the defense NAME of the zoo, unless there are weights of it; they are kept in the cache."""
    from robench import console, data, targets, training, workbench, zoo

    cache, device = _writable(cache_folder(cache_dir)), _available(device)
    _load_plugins(plugins)
    named, split = zoo.parse(name), data.load(dataset, "test")
    scale = scale or workbench.default_scale(dataset)
    with console.progress() as progress:
        target = targets.trained(named, split, scale=scale, seed=seed, device=device, cache=cache, ready_made=not fresh, progress=progress)
    how = dict(target.training or {})
    elsewhere = how.pop("weights", None)
    console.show_facts(
        [
            ("defense", f"{target.name} (version {target.version}, seed {seed})"),
            ("trained on", f"{dataset}, scale {scale}, {device}") if elsewhere is None else ("weights", str(elsewhere)),
            *([(stage, str(line)) for stage, line in how.items()] or [("training", "none is needed")]),
            ("weights", f"SHA-256 {training.state_hash(target.defense)}"),
            *([("kept in", str(cache / "training"))] if elsewhere is None else []),
        ]
    )


@main.command()
@click.argument("target")
@_dataset
@click.option("--threat", default="Linf:8/255", show_default=True, help="Norm (Linf, L2, L1) and budget.")
@click.option("--attack", default="autoattack", show_default=True, help="Name and parameters, as in pgd-20,restarts=5.")
@click.option("--n", type=int, help="The first N test examples.  [default: the scale's number]")
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="The attack's seed.")
@click.option("--training-seed", type=SEED, default=0, show_default=True, help="Which trained copy of a defense of the zoo.")
@click.option("--batch-size", type=click.IntRange(1), default=100, show_default=True, help="Examples attacked together.")
@_device
@_cache_dir
@_plugins
@click.option("--json", "json_file", metavar="FILE", help="Write the record to FILE, or with - alone to stdout.")
@click.option("--records", type=PATH, help="Save the record in this folder.")
@click.option("--figure", type=PATH, help="Draw the universal perturbation to this file (.png or .svg).")
@click.option("--max-passes", type=click.IntRange(1), help="Stop after the batch that reaches so many passes; the record is partial.")
@click.option("--time", "max_seconds", type=click.FloatRange(0, min_open=True), help="Likewise, after so many seconds.")
def evaluate(
    target: str, dataset: str, threat: str, attack: str, n: int | None, scale: "Scale | None", seed: int, training_seed: int,
    batch_size: int, device: str | None, cache_dir: Path | None, plugins: tuple[Path, ...], json_file: str | None,
    records: Path | None, figure: Path | None, max_passes: int | None, max_seconds: float | None,
) -> None:  # fmt: skip
    """Attack TARGET: a zoo name with parameters, robustbench:NAME, timm:NAME, or path/to/file.py:factory."""
    from robench import attacks, console, data, figures, record, targets, workbench
    from robench.evaluation import measure
    from robench.threat import ThreatModel

    # Whatever is wrong should show before anything is trained; a plugin may bring the attack.
    _load_plugins(plugins)
    within, parsed_attack = ThreatModel.parse(threat), attacks.parse(attack)
    if figure and (parsed_attack.apply is None or figure.suffix not in (".png", ".svg")):
        raise UserError(f"--figure draws what a universal attack learns, to a .png or .svg file; this is {attack}, to {figure.name}")
    cache, device = _writable(cache_folder(cache_dir)), _available(device)
    to_stdout = json_file == "-"
    json_path = Path(json_file) if json_file and not to_stdout else None
    for folder in filter(None, (records, json_path and json_path.parent, figure and figure.parent)):
        _writable(folder)

    def draw(delta: "Tensor") -> None:
        if figure:
            figures.perturbation(delta, figure, title=f"{target}, {within}, {attack}")

    split, scale = data.load(dataset, "test"), scale or workbench.default_scale(dataset)
    examples = split.first(min(len(split), workbench.EXAMPLES[scale]) if n is None else n)
    with console.progress() as progress:
        resolved = targets.resolve(target, examples, within, scale=scale, seed=training_seed, device=device, cache=cache, progress=progress)
        made = measure(
            resolved, examples, within, parsed_attack, seed=seed, batch_size=batch_size, device=device, scale=scale,
            cache=cache, max_passes=max_passes, max_seconds=max_seconds, progress=progress, learnt=draw,
        )  # fmt: skip
    facts = console.outcome(made)
    if records:
        facts.append(("record", str(record.save(made, records))))
    if json_path:
        write_atomic(json_path, record.to_json(made))
        facts.append(("json", str(json_path)))
    console.show_facts(facts, err=to_stdout)
    if to_stdout:
        click.echo(record.to_json(made), nl=False)


@main.command()
@click.argument("target")
@_dataset
@click.option("--threat", default="Linf:8/255", show_default=True, help="Norm (Linf, L2, L1) and budget.")
@click.option("--n", type=int, help="The first N test examples.  [default: 100, or all where there are fewer]")
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the doctor's attacks.")
@click.option("--training-seed", type=SEED, default=0, show_default=True, help="Which trained copy of a defense of the zoo.")
@_device
@_cache_dir
@_plugins
@click.option("--json", "json_file", metavar="FILE", help="Write the findings to FILE, or with - alone to stdout.")
def doctor(
    target: str, dataset: str, threat: str, n: int | None, scale: "Scale | None", seed: int, training_seed: int, device: str | None,
    cache_dir: Path | None, plugins: tuple[Path, ...], json_file: str | None,
) -> int:  # fmt: skip
    """Look for signs that TARGET's robustness is an artefact of masked gradients; exit code 1 where it likely is."""
    from robench import console, data, doctor, targets, workbench
    from robench.threat import ThreatModel

    # Whatever is wrong should show before anything is trained.
    within = ThreatModel.parse(threat)
    doctor.check_budget(within)
    cache, device = _writable(cache_folder(cache_dir)), _available(device)
    to_stdout = json_file == "-"
    json_path = Path(json_file) if json_file and not to_stdout else None
    if json_path:
        _writable(json_path.parent)
    _load_plugins(plugins)
    split, scale = data.load(dataset, "test"), scale or workbench.default_scale(dataset)
    examples = split.first(min(len(split), doctor.EXAMPLES) if n is None else n)
    with console.progress() as progress:
        resolved = targets.resolve(target, examples, within, scale=scale, seed=training_seed, device=device, cache=cache, progress=progress)
        diagnosis = doctor.examine(resolved, examples, within, seed=seed, device=device, progress=progress)
    if json_path:
        write_atomic(json_path, doctor.as_json(diagnosis))
    if to_stdout:
        click.echo(doctor.as_json(diagnosis), nl=False)
    else:
        console.show(doctor.as_table(diagnosis))
    console.show_facts(doctor.facts(diagnosis), err=to_stdout)
    return 1 if diagnosis.decided_by else 0


@main.group()
def weights() -> None:
    """Trained weights to share, on a hub or in a folder."""


@weights.command("push")
@click.argument("name")
@_dataset
@_scale
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which trained copy.")
@click.option("--to", "place", required=True, metavar="OWNER/REPO|FOLDER", help="A repository on $HF_ENDPOINT, or ./FOLDER.")
@click.option("--records", type=PATH, help=f"The folder of records; those of these weights go along.  [default: {RECORDS}, if there]")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@_device
@_cache_dir
@_plugins
def weights_push(
    name: str, dataset: str, scale: "Scale | None", seed: int, place: str, records: Path | None, private: bool, device: str | None,
    cache_dir: Path | None, plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Share the trained defense NAME with a model card and its records."""
    from robench import console, data, hub, record, targets, weights, workbench, zoo

    cache, device = _writable(cache_folder(cache_dir)), _available(device)
    _load_plugins(plugins)
    hub.is_folder(place)
    named, split = zoo.parse(name), data.load(dataset, "train")
    known = record.load_folder(records or RECORDS) if records or RECORDS.is_dir() else []
    setting = targets.setting_for(split, scale or workbench.default_scale(dataset), seed)
    with console.progress() as progress:
        config, content = weights.kept(named, setting, split, cache=cache, device=device, progress=progress)
        pushed = hub.push(config, content, known, place, cache=cache, private=private)
    own = len(hub.belonging(known, config))
    facts = [("records", f"{own} of these weights" if own else "none of these weights; the card claims no robustness")]
    console.show_facts([*console.weights_facts(config), *facts, ("pushed to", pushed)])


@weights.command("pull")
@click.argument("place", metavar="OWNER/REPO[@REVISION]|FOLDER")
@click.option("--records", type=PATH, help="Save the records that came along in this folder.")
@_cache_dir
@_plugins
def weights_pull(place: str, records: Path | None, cache_dir: Path | None, plugins: tuple[Path, ...]) -> None:
    """Take shared weights, checked, into the cache, where train, evaluate and the claims find them."""
    from robench import console, hub, record

    cache = _writable(cache_folder(cache_dir))
    if records:
        _writable(records)
    _load_plugins(plugins)
    with console.progress() as progress:
        pulled = hub.pull(place, cache=cache, progress=progress)
    for made in pulled.records if records else ():
        record.save(made, records or RECORDS)
    facts = [("records", f"{len(pulled.records)}{f', saved in {records}' if records else ''}")]
    facts += [("not checked", pulled.unchecked)] if pulled.unchecked else []
    console.show_facts([*console.weights_facts(pulled.config), *facts, ("kept in", str(pulled.folder))])


@main.command()
@click.option("--format", "style", type=click.Choice(["table", "md", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=PATH, help="Write to this file instead of stdout.")
@click.option("--dataset", help="Only this data set.")
@click.option("--threat", help="Only this threat model.")
@click.option("--records", type=PATH, default=RECORDS, show_default=True, help="The folder of records.")
@_plugins
def leaderboard(style: str, out: Path | None, dataset: str | None, threat: str | None, records: Path, plugins: tuple[Path, ...]) -> None:
    """Rank the defenses by what the records say."""
    from robench import attacks, claim, console, leaderboard, record, zoo

    zoo.discover(plugins)
    known = record.load_folder(records)
    rows = leaderboard.rows(
        known, dataset=dataset, threat=threat, verdicts=claim.verdicts_by_defense(claim.settle_all(known)),
        attack_versions={name: attack.version for name, attack in attacks.registered().items()},
        defense_versions={name: entry.version for name, entry in zoo.entries().items()},
    )  # fmt: skip
    if style == "table" and out is None:
        console.show(leaderboard.as_table(rows))
        return
    renderings: dict[str, Callable[[], str]] = {
        "table": lambda: console.as_text(leaderboard.as_table(rows)),
        "md": lambda: leaderboard.as_markdown(rows) + "\n",
        "json": lambda: leaderboard.as_json(rows) + "\n",
        "csv": lambda: leaderboard.as_csv(rows),
    }
    text = renderings[style]()
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--records", type=PATH, help=f"The folder of records that give the verdicts.  [default: {RECORDS}, if there]")
def claims(as_json: bool, records: Path | None) -> int:
    """List every claim: paper, number, protocol, last verdict."""
    from robench import claim, console, record

    known = record.load_folder(records or RECORDS) if records or RECORDS.is_dir() else []
    found, settled = claim.discover(), claim.settle_all(known)
    if as_json:
        click.echo(console.claims_json(found, settled))
    else:
        console.show(console.claims_table(found, settled))
    return 0 if all(settlement.as_stood_by for settlement in settled) else 1


@main.group()
def data() -> None:
    """The data sets."""


@data.command("list")
def data_list() -> None:
    """List the data sets and how to get those that are absent."""
    from robench import console, data

    console.show_facts(data.names())


@data.command("add")
@click.argument("name")
@click.option("--from", "source", type=PATH, required=True, help="FOLDER/{train,test}/CLASS/IMAGE, or FOLDER/CLASS/IMAGE.")
def data_add(name: str, source: Path) -> None:
    """Add a folder of images as the data set NAME."""
    from robench import data

    click.echo(f"{name} is in {data.add(name, source)}")


@data.command("fetch")
@click.argument("name")
def data_fetch(name: str) -> None:
    """Download the data set NAME: cifar10 or cifar100."""
    from robench import console, data

    with console.progress() as progress:
        folder = data.fetch(name, progress=progress)
    click.echo(f"{name} is in {folder}")


def _writable(folder: Path) -> Path:
    """Return the folder, having made sure that it can be written, which would otherwise show only after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"cannot write in the folder {folder}: {error.strerror or error}") from error


def _available(device: str | None) -> str:
    """Return a device that torch has here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device is None:
        return "cuda" if count else "cpu"
    if device not in known:
        raise UserError(f"torch has no device {device!r} here; it has {', '.join(known)}{nearest(device, known)}")
    return device


def _load_plugins(plugins: tuple[Path, ...]) -> None:
    from robench import zoo

    zoo.discover(plugins)
    for failure in zoo.failures():
        click.echo(f"robench: warning: {failure.origin} failed to load: {failure.reason}", err=True)

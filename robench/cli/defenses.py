"""Commands on what is evaluated and on what: zoo, train, weights, data."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robench.cli.common import (
    LAST_SEED,
    PATH,
    RECORDS,
    SEED,
    available,
    cache_option,
    dataset_option,
    device_option,
    load_plugins,
    main,
    plugin_option,
    scale_option,
    writable,
)  # fmt: skip
from robench.errors import UserError
from robench.files import cache_folder

if TYPE_CHECKING:
    from robench import zoo as zoo_
    from robench.data import Dataset
    from robench.targets import Target
    from robench.zoo import Scale


@main.group()
def zoo() -> None:
    """The defenses."""


@zoo.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
def zoo_list(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the defenses, where each comes from, and what failed to load and why."""
    from robench import console, zoo

    # What a plugin prints is no result.
    with contextlib.redirect_stdout(sys.stderr):
        zoo.discover(plugins)
    if as_json:
        click.echo(console.zoo_json(zoo.entries(), zoo.failures()))
        return
    console.show(console.zoo_table(zoo.entries()))
    for failure in zoo.failures():
        click.echo(f"failed to load: {failure.origin}: {failure.reason}")


@main.command()
@click.argument("name")
@dataset_option
@scale_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Tells independently trained copies apart.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Train so many copies, from --seed on.")
@click.option("--budget", metavar="DURATION", help="Train each copy for as many epochs as fit: 9m, 1h30m.")
@click.option("--fresh", is_flag=True, help="Train anew, whatever weights there are, and use that until a pull.")
@device_option
@cache_option
@plugin_option
def train(
    name: str, dataset: str, scale: "Scale | None", seed: int, seeds: int, budget: str | None, fresh: bool, device: str | None,
    cache_dir: Path | None, plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Train the defense NAME of the zoo, unless there are weights of it; they are kept in the cache.

    NAME,epochs=N trains its first stage for N epochs and the others in proportion; --budget chooses N by timing a few steps here, and
    says which name the weights have.
    """
    from robench import console, data, targets, workbench, zoo

    if (last := seed + seeds - 1) > LAST_SEED:
        raise UserError(f"the last of {seeds} copies from seed {seed} on would have the seed {last}, above {LAST_SEED}")
    cache, device = writable(cache_folder(cache_dir)), available(device)
    load_plugins(plugins)
    named, split = zoo.parse(name), data.load(dataset, "test")
    scale = scale or workbench.default_scale(dataset)
    if budget is not None:
        named = _within(named, split, scale, budget, device)
    for copy in range(seed, seed + seeds):
        with console.progress() as progress:
            target = targets.trained(named, split, scale=scale, seed=copy, device=device, cache=cache, anew=fresh, progress=progress)
        _show_trained(target, f"{dataset}, scale {scale}, {device}", cache)


def _within(named: "zoo_.Named", split: "Dataset", scale: "Scale", budget: str, device: str) -> "zoo_.Named":
    """Return the defense with as many epochs as a budget fits."""
    import dataclasses

    from robench import data, duration, targets, training_budget

    if named.epochs is not None:
        raise UserError(f"{named.text} has its epochs and --budget would choose them; leave one out")
    seconds, setting = duration.seconds(budget), targets.setting_for(split, scale, 0)
    epochs = training_budget.fitting_epochs(named.build(setting), data.load(split.name, "train"), seconds, device)
    return dataclasses.replace(named, epochs=epochs)


def _show_trained(target: "Target", where: str, cache: Path) -> None:
    from robench import console, fingerprint

    how = dict(target.training or {})
    elsewhere = how.pop("weights", None)
    console.show_facts(
        [
            ("defense", f"{target.name} (version {target.version}, seed {target.training_seed})"),
            ("trained on", where) if elsewhere is None else ("weights", str(elsewhere)),
            *([(stage, str(line)) for stage, line in how.items()] or [("training", "none is needed")]),
            ("weights", f"SHA-256 {fingerprint.state_hash(target.defense)}"),
            *([("kept in", str(cache / "training"))] if elsewhere is None else []),
        ]
    )


@main.group()
def weights() -> None:
    """Trained weights to share, on a hub or in a folder."""


@weights.command("push")
@click.argument("name")
@dataset_option
@scale_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which trained copy.")
@click.option("--to", "place", required=True, metavar="OWNER/REPO|FOLDER", help="A repository on $HF_ENDPOINT, or ./FOLDER.")
@click.option("--records", type=PATH, help=f"The folder of records; those of these weights go along.  [default: {RECORDS}, if there]")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@device_option
@cache_option
@plugin_option
def weights_push(
    name: str, dataset: str, scale: "Scale | None", seed: int, place: str, records: Path | None, private: bool, device: str | None,
    cache_dir: Path | None, plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Share the trained defense NAME with a model card and its records."""
    from robench import console, data, hub, record, targets, weights, workbench, zoo

    cache, device = writable(cache_folder(cache_dir)), available(device)
    load_plugins(plugins)
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
@cache_option
@plugin_option
def weights_pull(place: str, records: Path | None, cache_dir: Path | None, plugins: tuple[Path, ...]) -> None:
    """Take shared weights, checked, into the cache, where train, evaluate and the claims find them."""
    from robench import console, hub, record

    cache = writable(cache_folder(cache_dir))
    if records:
        writable(records)
    load_plugins(plugins)
    with console.progress() as progress:
        pulled = hub.pull(place, cache=cache, progress=progress)
    for made in pulled.records if records else ():
        record.save(made, records or RECORDS)
    facts = [("records", f"{len(pulled.records)}{f', saved in {records}' if records else ''}")]
    facts += [("not checked", pulled.unchecked)] if pulled.unchecked else []
    console.show_facts([*console.weights_facts(pulled.config), *facts, ("kept in", str(pulled.folder))])


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
    from robench import obtain

    click.echo(f"{name} is in {obtain.add(name, source)}")


@data.command("fetch")
@click.argument("name")
def data_fetch(name: str) -> None:
    """Download the data set NAME: cifar10 or cifar100."""
    from robench import console, obtain

    with console.progress() as progress:
        folder = obtain.fetch(name, progress=progress)
    click.echo(f"{name} is in {folder}")

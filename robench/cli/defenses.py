"""Commands on what is evaluated and on what: zoo, train, weights, data."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robench.cli.common import (
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
from robench.files import cache_folder

if TYPE_CHECKING:
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
@click.option("--fresh", is_flag=True, help="Train anew, whatever weights there are.")
@device_option
@cache_option
@plugin_option
def train(
    name: str, dataset: str, scale: "Scale | None", seed: int, fresh: bool, device: str | None, cache_dir: Path | None,
    plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Train the defense NAME of the zoo, unless there are weights of it; they are kept in the cache."""
    from robench import console, data, targets, training, workbench, zoo

    cache, device = writable(cache_folder(cache_dir)), available(device)
    load_plugins(plugins)
    named, split = zoo.parse(name), data.load(dataset, "test")
    scale = scale or workbench.default_scale(dataset)
    with console.progress() as progress:
        target = targets.trained(named, split, scale=scale, seed=seed, device=device, cache=cache, anew=fresh, progress=progress)
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

"""Commands that attack one target: evaluate, doctor."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robench.cli.common import (
    PATH,
    SEED,
    available,
    cache_option,
    dataset_option,
    device_option,
    in_seconds,
    load_plugins,
    main,
    no_folder,
    plugin_option,
    scale_option,
    writable,
)  # fmt: skip
from robench.errors import UserError
from robench.files import cache_folder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from robench.recipe import Precision
    from robench.zoo import Scale


@main.command()
@click.argument("target")
@dataset_option
@click.option("--threat", default="Linf:8/255", show_default=True, help="Norm (Linf, L2, L1) and budget.")
@click.option("--attack", default="autoattack", show_default=True, help="Name and parameters, as in pgd-20,restarts=5.")
@click.option("--n", type=int, help="The first N test examples.  [default: the scale's number]")
@scale_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="The attack's seed.")
@click.option("--training-seed", type=SEED, default=0, show_default=True, help="Which trained copy of a defense of the zoo.")
@click.option("--batch-size", type=click.IntRange(1), help="Examples attacked together.  [default: 100, on cuda 500]")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]),
    help="Of the attack; what it finds is confirmed in float32.  [default: bfloat16 on cuda, else float32]",
)  # fmt: skip
@device_option
@cache_option
@plugin_option
@click.option("--json", "json_file", metavar="FILE", help="Write the record to FILE, or with - alone to stdout.")
@click.option("--records", type=PATH, help="Save the record in this folder.")
@click.option("--figure", type=PATH, help="Draw the universal perturbation to this file (.png or .svg).")
@click.option("--max-passes", type=click.IntRange(1), help="Stop after the batch that reaches so many passes; the record is partial.")
@click.option("--time", "max_seconds", metavar="DURATION", callback=in_seconds, help="Likewise, after so long: 90s, 9m, 1h30m.")
def evaluate(
    target: str, dataset: str, threat: str, attack: str, n: int | None, scale: "Scale | None", seed: int, training_seed: int,
    batch_size: int | None, precision: "Precision | None", device: str | None, cache_dir: Path | None, plugins: tuple[Path, ...],
    json_file: str | None, records: Path | None, figure: Path | None, max_passes: int | None, max_seconds: float | None,
) -> None:  # fmt: skip
    """Attack TARGET: a zoo name with parameters, robustbench:NAME, timm:NAME, or path/to/file.py:factory."""
    from robench import attacks, console, data, figures, record, targets, workbench
    from robench.evaluation import measure
    from robench.threat import ThreatModel

    # Whatever is wrong should show before anything is trained; a plugin may bring the attack.
    load_plugins(plugins)
    within, parsed_attack = ThreatModel.parse(threat), attacks.parse(attack)
    if figure and (parsed_attack.apply is None or figure.suffix not in (".png", ".svg")):
        raise UserError(f"--figure draws what a universal attack learns, to a .png or .svg file; this is {attack}, to {figure.name}")
    cache, device = writable(cache_folder(cache_dir)), available(device)
    to_stdout = json_file == "-"
    json_path = PATH.convert(json_file, None, None) if json_file is not None and not to_stdout else None
    no_folder(json_path)
    no_folder(figure)
    for folder in filter(None, (records, json_path and json_path.parent, figure and figure.parent)):
        writable(folder)

    def draw(delta: "Tensor") -> None:
        if figure:
            figures.perturbation(delta, figure, title=f"{target}, {within}, {attack}")

    split, scale = data.load(dataset, "test"), scale or workbench.default_scale(dataset)
    examples = split.first(min(len(split), workbench.EXAMPLES[scale]) if n is None else n)
    # What a model prints is no result.
    with console.progress() as progress, contextlib.redirect_stdout(sys.stderr):
        resolved = targets.resolve(target, examples, within, scale=scale, seed=training_seed, device=device, cache=cache, progress=progress)
        made = measure(
            resolved, examples, within, parsed_attack, seed=seed, batch_size=batch_size, device=device, scale=scale, precision=precision,
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
@dataset_option
@click.option("--threat", default="Linf:8/255", show_default=True, help="Norm (Linf, L2, L1) and budget.")
@click.option("--n", type=int, help="The first N test examples.  [default: 100, or all where there are fewer]")
@scale_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the doctor's attacks.")
@click.option("--training-seed", type=SEED, default=0, show_default=True, help="Which trained copy of a defense of the zoo.")
@device_option
@cache_option
@plugin_option
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
    cache, device = writable(cache_folder(cache_dir)), available(device)
    to_stdout = json_file == "-"
    json_path = PATH.convert(json_file, None, None) if json_file is not None and not to_stdout else None
    no_folder(json_path)
    if json_path:
        writable(json_path.parent)
    load_plugins(plugins)
    split, scale = data.load(dataset, "test"), scale or workbench.default_scale(dataset)
    examples = split.first(min(len(split), doctor.EXAMPLES) if n is None else n)
    # What a model prints is no result.
    with console.progress() as progress, contextlib.redirect_stdout(sys.stderr):
        resolved = targets.resolve(target, examples, within, scale=scale, seed=training_seed, device=device, cache=cache, progress=progress)
        diagnosis = doctor.examine(resolved, examples, within, seed=seed, device=device, scale=scale, progress=progress)
    if json_path:
        write_atomic(json_path, doctor.as_json(diagnosis))
    if to_stdout:
        click.echo(doctor.as_json(diagnosis), nl=False)
    else:
        console.show(doctor.as_table(diagnosis))
    console.show_facts(doctor.facts(diagnosis), err=to_stdout)
    return 1 if diagnosis.decided_by else 0

"""Attacks beside the reference on the same trained defenses, in one run: robust accuracy, passes and processor time.

    python -m benchmarks.strength                                       digits, minutes
    python -m benchmarks.strength --dataset cifar10 --n 1000 --out benchmarks/results/strength-cifar10.txt

What is measured is kept in the cache, so a run that was stopped goes on. An attack is compared with `pyautoattack` at its published
settings on the same examples; on a random defense with `pyautoattack-rand`, whose images are scored on fresh draws like all others.
"""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from tabulate import tabulate

from benchmarks import decoys
from benchmarks.decoy_defenses import DECOYS
from robench import attacks, data, provenance, targets, workbench, zoo
from robench.errors import UserError
from robench.evaluation import measure
from robench.files import cache_folder, write_atomic
from robench.recipe import Precision
from robench.record import Record
from robench.targets import Target
from robench.threat import ThreatModel

SUBJECTS = {
    "digits": (
        ("natural", "Linf:48/255"), ("single_adv", "Linf:48/255"), ("ensemble2_adv", "Linf:48/255"), ("separate2_adv", "Linf:48/255"),
        ("robust,eps=2", "L2:2"), ("robust_average,k=4,eps=1", "L2:2"), ("composite,eps=2,alpha=0.2", "L2:2"),
        ("multires_self_ensemble", "Linf:48/255"),
    ),
    "cifar10": (
        ("natural", "Linf:8/255"), ("single_adv", "Linf:8/255"), ("separate2_adv", "Linf:8/255"), ("ensemble2_adv", "Linf:8/255"),
        ("robust,eps=0.5", "L2:0.5"), ("robust_average,k=4,eps=0.22", "L2:0.5"), ("composite", "L2:0.5"),
        ("saturated_logits", "Linf:8/255"), ("rounded_logits", "Linf:8/255"), ("quantised_input", "Linf:8/255"),
        ("multires_self_ensemble", "Linf:8/255"),
    ),
}  # fmt: skip
"""Defenses by data set, of the zoo or decoys on its natural network, each with the threat model it is attacked within."""
ATTACKS = ("fast", "adaptive", "autoattack")
HEADERS = ("defense", "threat", "attack", "clean", "robust", "standing here only", "standing there only", "passes per image",
           "of the reference", "seconds", "speed-up")  # fmt: skip


def rows(reference: Record, made: Record) -> list[str]:
    """Return a line of the table: one attack beside the reference on the same examples."""
    here, there = ([outcome > 0.5 for outcome in r.outcomes.robust] for r in (made, reference))
    passes = [r.cost.forwards + r.cost.backwards for r in (made, reference)]
    speed_up = reference.timing.seconds / made.timing.seconds if made.timing.seconds else float("inf")
    only = [sum(a and not b for a, b in pair) for pair in (zip(here, there, strict=True), zip(there, here, strict=True))]
    return [
        made.defense.name, made.threat, made.attack.name, f"{100 * made.clean_accuracy.value:.1f}",
        f"{100 * made.robust_accuracy.value:.1f}", *map(str, only), f"{passes[0]:,.0f}", f"1/{passes[1] / passes[0]:.1f}",
        f"{made.timing.seconds:,.1f}", f"{speed_up:.1f}",
    ]  # fmt: skip


def compare(
    dataset: str, names: list[str] | None, contenders: list[str], n: int, cache: Path, precision: Precision, batch_size: int
) -> list[list[str]]:
    """Train what is not trained, attack each defense by the reference and every contender, and return the table's lines.

    Our AutoAttack runs in `precision`, `batch_size` images together; the reference in float32 and 250 together, as it is published, but
    for the weights' gradients, which are left out. Our short attacks run in float32: bfloat16 costs `fast` two of 1000 images.
    """
    split = data.load(dataset, "test").first(n)
    table = []
    for name, text in SUBJECTS[dataset]:
        if names and name not in names:
            continue
        threat, scale = ThreatModel.parse(text), workbench.default_scale(dataset)
        if name in DECOYS:
            (decoy,) = decoys.cases(split, scale, cache, [name])
            target = Target(decoy.defense, decoy.name)
        else:
            target = targets.trained(zoo.parse(name), split, scale=scale, cache=cache)
        reference = ("pyautoattack-rand" if target.defense.random else "pyautoattack") + ",batch_size=250"
        random = {"autoattack": "autoattack-rand"} if target.defense.random else {}
        made = [
            measure(
                target, split, threat, attacks.parse(attack), scale=scale, batch_size=batch_size, cache=cache, progress=told,
                precision=precision if attack.startswith("autoattack") else "float32",
            )
            for attack in (reference, *(random.get(attack, attack) for attack in contenders))
        ]  # fmt: skip
        table += [rows(made[0], one) for one in made]
    return table


def told(line: str) -> None:
    """Show what was done of a long run at once."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print the table, with hardware and versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(SUBJECTS), default="digits")
    parser.add_argument("--defense", action="append", help="only this one; repeatable")
    parser.add_argument("--attack", action="append", help=f"beside the reference; repeatable (default {', '.join(ATTACKS)})")
    parser.add_argument("--n", type=int, default=200, help="test examples (default 200)")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="of our AutoAttack (default float32)")
    parser.add_argument("--batch-size", type=int, default=500, help="images that robench attacks together (default 500)")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        table = compare(
            options.dataset,
            options.defense,
            options.attack or list(ATTACKS),
            options.n,
            cache_folder(),
            options.precision,
            options.batch_size,
        )
    except UserError as error:
        raise SystemExit(f"benchmarks: error: {error}") from error
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    text = tabulate(table, headers=HEADERS, tablefmt="github", disable_numparse=True)
    text += f"\n\n{options.dataset}, the first {options.n} test images; our AutoAttack in {options.precision}, the rest in float32; "
    text += f"{options.batch_size} images together, pyautoattack 250; one thread; "
    text += f"{source.processor}; {versions}; {platform.system()}; commit {source.commit}\n"
    print(text)
    if options.out:
        write_atomic(options.out, text)


if __name__ == "__main__":
    main()

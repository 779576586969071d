"""Which attacks and checks see through defenses that only seem robust: one row for each decoy, and for two honest models.

    python -m benchmarks.decoys --n 100 --attacks pyautoattack adaptive     prints the table

The truth beside the attacks is the decoy's accuracy on what fools its undefended networks, the worst over `TRUTH`: no attack on
the decoy itself, however well its gradient is hidden, need leave more. `-` stands where an attack is for the other kind
(deterministic or random), `refused` where it says that it cannot attack such a defense.
"""

import argparse
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.decoy_defenses import DECOYS, honest
from robench import attacks, data, doctor, provenance, targets, workbench, zoo
from robench.attacks import Attack, mean_surrogate
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.errors import UserError
from robench.evaluation import measure
from robench.record import Record
from robench.scoring import predictions
from robench.targets import Target
from robench.threat import ThreatModel

TRUTH = ("apgd-ce,steps=50", "apgd-t,steps=50,targets=3", "pgd-50", "pgd-50,loss=margin")
"""Attacks on the undefended networks. PGD goes on after the border is crossed, which APGD does not, and so transfers better."""

HELD_OUT = (
    "held out: not used to make the doctor's thresholds or the attacks, except that the doctor counts a late rise of the loss only where "
    "many examples stand since k_winners was seen, and that the attack on bare networks was tried on steep_staircase too"
)
ATTACKS = ("pyautoattack", "pyautoattack-rand", "square", "fast", "adaptive")
RANDOM_ONLY = ("pyautoattack-rand", "autoattack-rand")
DETERMINISTIC_ONLY = ("pyautoattack", "autoattack")

THREAT = {"digits": "Linf:48/255"}
"""The budget of a data set's adversarial training; Linf:8/255 elsewhere."""

HONEST = ("natural", "single_adv")
SELF_ENSEMBLE = "multires_self_ensemble"
"""A defense of the zoo that is a decoy by itself: noise and CrossMax on one network."""


@dataclass(frozen=True)
class Case:
    """One row: a defense, what is attacked for the truth, and whether the doctor's thresholds were set without it."""

    name: str
    defense: Defense
    undefended: Defense
    held_out: bool = False


def cases(dataset: Dataset, scale: zoo.Scale, cache: Path | None, only: Sequence[str] = ()) -> list[Case]:
    """Return two honest models, every decoy on naturally trained networks, and the zoo's self-ensemble; or `only` some of them.

    Raises:
        UserError: for an unknown name in `only`.
    """
    names = (*HONEST, *DECOYS, SELF_ENSEMBLE)
    if unknown := set(only) - set(names):
        raise UserError(f"unknown decoys {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    chosen = [name for name in names if not only or name in only]

    def trained(name: str, seed: int = 0) -> Defense:
        return targets.trained(zoo.parse(name), dataset, scale=scale, seed=seed, cache=cache).defense

    networks = [trained("natural", seed) for seed in range(max((DECOYS[n].networks for n in chosen if n in DECOYS), default=0))]
    found = []
    for name in chosen:
        if name in DECOYS:
            decoy = DECOYS[name]
            # A defense of one network is that network: hooks and structure are then the network's own.
            members = [network.members()[0] for network in networks[: decoy.networks]]
            found.append(Case(name, decoy.build(members).eval(), honest(members).eval(), decoy.held_out))
        else:
            defense = trained(name)
            found.append(Case(name, defense, mean_surrogate(defense)))
    return found


def truth(case: Case, dataset: Dataset, threat: ThreatModel, seed: int) -> float:
    """Return the accuracy left by the attacks on the undefended networks: the worst of each example, or for a random defense
    the worst attack.
    """
    x, examples = as_float(dataset.images), torch.arange(len(dataset))
    outcomes = []
    # Without a record, which for a random defense would cost its controls each time.
    for name in TRUTH:
        x_adv = attacks.parse(name)(case.undefended, x, dataset.labels, threat, examples=examples, seed=seed)
        outcomes.append((predictions(case.defense, x_adv, examples, seed) == dataset.labels).double().mean(0))
    left = torch.stack([*outcomes, (predictions(case.defense, x, examples, seed) == dataset.labels).double().mean(0)])
    return float(left.mean(1).min() if case.defense.random else left.amin(0).mean())


def measured(case: Case, dataset: Dataset, threat: ThreatModel, attack: Attack, seed: int) -> Record:
    return measure(Target(case.defense, case.name), dataset, threat, attack, seed=seed)


def cell(case: Case, dataset: Dataset, threat: ThreatModel, name: str, seed: int) -> str:
    """Return the robust accuracy under an attack by name, in percent, or why there is none."""
    if name.partition(",")[0] in (DETERMINISTIC_ONLY if case.defense.random else RANDOM_ONLY):
        return "-"
    try:
        return f"{100 * measured(case, dataset, threat, attacks.parse(name), seed).robust_accuracy.value:.0f}"
    except UserError as error:
        print(f"{case.name}: {error}", file=sys.stderr)
        return "refused"


def row(case: Case, dataset: Dataset, threat: ThreatModel, names: Sequence[str], seed: int) -> list[str]:
    """Return one line of the table."""
    diagnosis = doctor.examine(Target(case.defense, case.name), dataset, threat, seed=seed)
    return [
        case.name + " (held out)" * case.held_out, f"{100 * diagnosis.clean_accuracy.value:.0f}",
        f"{100 * truth(case, dataset, threat, seed):.0f}", *(cell(case, dataset, threat, name, seed) for name in names),
        f"{100 * diagnosis.robust_accuracy.value:.0f}", diagnosis.verdict, ", ".join(diagnosis.decided_by),
    ]  # fmt: skip


def usable(names: Sequence[str]) -> list[str]:
    """Return the attacks that are registered, with a note on stderr for each that is not."""
    found = []
    for name in names:
        try:
            attacks.parse(name)
            found.append(name)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoys", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--threat", help="Linf:48/255 for digits, else Linf:8/255")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--scale", choices=["smoke", "cpu", "gpu", "paper"], help="smoke for digits, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", nargs="*", default=ATTACKS, help="names with parameters, as in square,queries=1000")
    parser.add_argument("--only", nargs="*", default=(), help="rows to print")
    parser.add_argument("--cache-dir", type=Path)
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        dataset, scale = data.load(chosen.dataset, "test").first(chosen.n), chosen.scale or workbench.default_scale(chosen.dataset)
        threat = ThreatModel.parse(chosen.threat or THREAT.get(chosen.dataset, "Linf:8/255"))
        chosen_cases = cases(dataset, scale, chosen.cache_dir, chosen.only)
        names, rows = usable(chosen.attacks), []
        for case in chosen_cases:
            rows.append(row(case, dataset, threat, names, chosen.seed))
            print("  ".join(rows[-1]), file=sys.stderr)
    except UserError as error:
        print(f"benchmarks.decoys: error: {error}", file=sys.stderr)
        return 2
    headers = ["defense", "clean", "truth", *names, "doctor's attacks", "doctor's verdict", "because of"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print(f"\naccuracies in %; {dataset.name}, first {len(dataset)}, scale {scale}, {threat}, seed {chosen.seed}")
    print(HELD_OUT)
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    print(f"{source.processor}; {versions}; {platform.system()}\ncommit {source.commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

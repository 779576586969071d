"""A workbench: measures what a claim needs on one data set and scale, unless a record of it exists already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from robench import attacks, claim, data, record, zoo
from robench.claim import Accuracy
from robench.data import Dataset
from robench.evaluation import measure
from robench.record import Record
from robench.targets import Target, trained
from robench.threat import ThreatModel
from robench.zoo import Scale

EXAMPLES: dict[Scale, int] = {"smoke": 300, "cpu": 1000, "gpu": 10_000, "paper": 10_000}
"""Test examples of each scale, or all where there are fewer."""

STRONGEST: dict[Scale, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "smoke": (("apgd-t,steps=20,targets=2",), ("mean-transfer-20,draws=2",)),
    "cpu": (("apgd-ce", "apgd-t,steps=50,targets=3"), ("mean-transfer-100,draws=8", "apgd-ce,draws=8")),
    "gpu": (("autoattack",), ("mean-transfer-200,draws=16", "apgd-ce,draws=16")),
    "paper": (("autoattack",), ("mean-transfer-500,draws=20", "apgd-ce,draws=20")),
}
"""Attacks beside the paper's own that claims are held against at each scale: on a deterministic defense, on a random one."""


def default_scale(dataset: str) -> Scale:
    """Return the scale a data set is measured at unless one is asked for."""
    return "smoke" if dataset == "digits" else "cpu"


@dataclass
class Workbench:
    """One data set, one scale, and where records are found and kept.

    Attributes:
        dataset_name: the data set.
        scale: the scale.
        records: known records; what is measured is added.
        device: ``cpu`` or ``cuda``.
        cache: the cache folder.
        keep: the folder that new records are written to, at once; None writes none.
        examples: test examples; the scale's number by default.
        ready_made: whether weights that were pulled or come with the zoo are taken; False trains.
        progress: is told each line of training and evaluation.
    """

    dataset_name: str
    scale: Scale
    records: list[Record] = field(default_factory=list)
    device: str = "cpu"
    cache: Path | None = None
    keep: Path | None = None
    examples: int | None = None
    ready_made: bool = True
    progress: Callable[[str], None] = lambda _line: None
    _targets: dict[tuple[str, int], Target] = field(default_factory=dict, repr=False)

    @cached_property
    def dataset(self) -> Dataset:
        """The examples; raises UserError where the data set is absent."""
        split = data.load(self.dataset_name, "test")
        return split.first(min(len(split), self.examples or EXAMPLES[self.scale]))

    def target(self, name: str, seed: int = 0) -> Target:
        """Return a trained defense of the zoo."""
        key = (zoo.parse(name).text, seed)
        if key not in self._targets:
            self._targets[key] = trained(
                zoo.parse(name), self.dataset, scale=self.scale, seed=seed, device=self.device, cache=self.cache,
                ready_made=self.ready_made, progress=lambda line: self.progress(f"training {name}: {line}"),
            )  # fmt: skip
        return self._targets[key]

    def measured(self, name: str, threat: str, attack: str, seed: int = 0, n: int | None = None) -> Record:
        """Return the record of a defense under an attack, measuring it if there is none."""
        accuracy = Accuracy(name, threat, attack)
        examples = self.dataset if n is None else self.dataset.first(min(n, len(self.dataset)))
        known = claim.matching(self.records, accuracy, self.dataset_name, self.scale, seed)
        if known and known[0].dataset.n >= len(examples):
            return known[0]
        made = measure(
            self.target(name, seed), examples, ThreatModel.parse(threat), attacks.parse(attack), device=self.device, scale=self.scale,
            cache=self.cache, progress=self.progress,
        )  # fmt: skip
        self.records.append(made)
        if self.keep is not None:
            record.save(made, self.keep)
        return made

    def strongest(self, name: str, threat: str, seed: int = 0) -> list[Record]:
        """Return the records of a defense under the attacks that this scale holds claims against."""
        deterministic, random = STRONGEST[self.scale]
        chosen = random if self.target(name, seed).defense.random else deterministic
        return [self.measured(name, threat, attack, seed) for attack in chosen]

    def settled_by_records(self, accuracy: Accuracy, seed: int) -> bool:
        """Return whether the known records settle an accuracy, so that nothing needs to be measured."""
        known = claim.matching(self.records, accuracy, self.dataset_name, self.scale, seed)
        against = [attacks.parse(text) for text in accuracy.against]
        tried = [(r.attack.name, r.attack.parameters) for r in known]
        return len(known) >= (1 if accuracy.threat is None else 2) and all((a.name, dict(a.parameters)) in tried for a in against)

    def find(self, accuracy: Accuracy, seed: int) -> Sequence[Record]:
        """Return the records of an accuracy, measuring the paper's attack and the strongest ones where they are missing."""
        if not self.settled_by_records(accuracy, seed):
            # A clean accuracy comes with any record; FGSM of no budget is the cheapest.
            self.measured(accuracy.defense, accuracy.threat or "Linf:0", accuracy.attack or "fgsm", seed)
            if accuracy.threat is not None:
                self.strongest(accuracy.defense, accuracy.threat, seed)
                for attack in accuracy.against:
                    self.measured(accuracy.defense, accuracy.threat, attack, seed)
        return claim.matching(self.records, accuracy, self.dataset_name, self.scale, seed)

"""A workbench: measures what a claim needs on one data set and scale, unless a record of it exists already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from robench import attacks, data, record, settlement, targets, zoo
from robench.claim import Accuracy, held_against
from robench.data import Dataset
from robench.errors import UserError
from robench.evaluation import measure
from robench.record import Record
from robench.targets import Target
from robench.threat import ThreatModel
from robench.zoo import Scale

EXAMPLES: dict[Scale, int] = {"smoke": 300, "cpu": 1000, "gpu": 10_000, "paper": 10_000}
"""Test examples of each scale, or all where there are fewer."""


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
        batch_size: examples attacked together; `evaluation.BATCH_SIZE` by default.
        ready_made: whether weights that were pulled or come with the zoo are taken; False trains.
        progress: is told each line of training and evaluation.
        stop: is asked between epochs and between chunks of examples; where it says yes, OutOfTimeError ends what was going on.
    """

    dataset_name: str
    scale: Scale
    records: list[Record] = field(default_factory=list)
    device: str = "cpu"
    cache: Path | None = None
    keep: Path | None = None
    examples: int | None = None
    batch_size: int | None = None
    ready_made: bool = True
    progress: Callable[[str], None] = lambda _line: None
    stop: Callable[[], bool] = lambda: False
    _targets: dict[tuple[str, int], Target] = field(default_factory=dict, repr=False)
    _random: dict[str, bool] = field(default_factory=dict, repr=False)
    _weights: dict[tuple[str, int], str] = field(default_factory=dict, repr=False)

    @cached_property
    def dataset(self) -> Dataset:
        """The examples; raises UserError where the data set is absent."""
        return self._split.first(min(len(self._split), self.wanted))

    @cached_property
    def _split(self) -> Dataset:
        return data.load(self.dataset_name, "test")

    @property
    def wanted(self) -> int:
        """The examples that an accuracy should rest on, where the data set has so many."""
        return self.examples or EXAMPLES[self.scale]

    def target(self, name: str, seed: int = 0) -> Target:
        """Return a trained defense of the zoo."""
        key = (zoo.parse(name).text, seed)
        if key not in self._targets:
            self._targets[key] = targets.trained(
                zoo.parse(name), self.dataset, scale=self.scale, seed=seed, device=self.device, cache=self.cache,
                ready_made=self.ready_made, progress=lambda line: self.progress(f"training {name}: {line}"), stop=self.stop,
            )  # fmt: skip
        return self._targets[key]

    def random(self, name: str) -> bool:
        """Return whether a defense of the zoo is random, which shows before it is trained."""
        named = zoo.parse(name)
        if named.text not in self._random:
            setting = targets.setting_for(self.dataset, self.scale, seed=0)
            self._random[named.text] = named.build(setting).defense.random
        return self._random[named.text]

    def has(self, name: str, threat: str, attack: str, seed: int = 0, n: int | None = None) -> bool:
        """Return whether a known record measures a defense under an attack, on `n` examples (by default those wanted) or on all."""
        known = self._known(name, threat, attack, seed)
        return bool(known) and self._enough(known[0], n)

    def measured(self, name: str, threat: str, attack: str, seed: int = 0, n: int | None = None) -> Record:
        """Return the record of a defense under an attack, measuring it if there is none on `n` examples (by default those wanted)."""
        known = self._known(name, threat, attack, seed)
        if known and self._enough(known[0], n):
            return known[0]
        examples = self._split.first(min(len(self._split), self.wanted if n is None else n))
        made = measure(
            self.target(name, seed), examples, ThreatModel.parse(threat), attacks.parse(attack), batch_size=self.batch_size,
            device=self.device, scale=self.scale, cache=self.cache, progress=self.progress, stop=self.stop,
        )  # fmt: skip
        # Written, it takes the place of one of the same name, though that be of other weights.
        self.records[:] = [r for r in self.records if record.file_name(r) != record.file_name(made)]
        self.records.append(made)
        self._weights[made.defense.name, seed] = made.defense.weights_sha256
        if self.keep is not None:
            record.save(made, self.keep)
        return made

    def needed(self, accuracy: Accuracy) -> list[tuple[str, str, str]]:
        """Return the measurements (defense, threat, attack) that an accuracy rests on, each once.

        For a robust accuracy the paper's attack, those that this scale holds claims against, and those the accuracy names. A clean
        accuracy comes with any record; of no budget, FGSM is the cheapest.
        """
        if accuracy.threat is None:
            return [(accuracy.defense, "Linf:0", "fgsm")]
        chosen = dict.fromkeys((accuracy.attack or "", *held_against(accuracy, self.scale, self.random(accuracy.defense))))
        return [(accuracy.defense, accuracy.threat, attack) for attack in chosen]

    def recorded(self, accuracy: Accuracy, seed: int) -> bool:
        """Return whether the known records tell an accuracy, a robust one under the paper's attack, on enough examples."""
        known = self._matching(accuracy, seed)
        return bool(known) and self._enough(known[0])

    def settled_by_records(self, accuracy: Accuracy, seed: int) -> bool:
        """Return whether the known records settle an accuracy, so that nothing needs to be measured.

        A robust one is settled with all that `needed` names, on enough examples each. Further records of fewer examples count in the
        worst case all the same.
        """
        known = self._matching(accuracy, seed)
        enough = [r for r in known if self._enough(r)]
        # The paper's attack comes first.
        found = enough[:1] == known[:1] and bool(enough)
        return found and (accuracy.threat is None or settlement.tried(accuracy, self.scale, enough))

    def _enough(self, r: Record, n: int | None = None) -> bool:
        """Say whether a record has `n` examples (by default those wanted), or all that there are."""
        if r.dataset.n >= (self.wanted if n is None else n):
            return True
        try:
            return r.dataset.n >= len(self._split)
        except UserError:
            # Without the data nobody knows of fewer.
            return False

    def forget_mixed(self, needs: Sequence[tuple[str, str, str, int]]) -> None:
        """Forget the records of `needs` (defense, threat, attack, seed) if they are of different weights: none of them settles another.

        Those of weights that something was measured of here are kept, so that measuring the rest makes them all of these.
        """
        found = [known[0] for name, threat, attack, seed in needs if (known := self._known(name, threat, attack, seed))]
        if len({r.defense.weights_sha256 for r in found}) > 1:
            kept = [self._weights.get((r.defense.name, r.defense.training_seed)) for r in found]
            gone = {id(r) for r, own in zip(found, kept, strict=True) if r.defense.weights_sha256 != own}
            self.records[:] = [r for r in self.records if id(r) not in gone]

    def _known(self, name: str, threat: str, attack: str, seed: int) -> list[Record]:
        return self._matching(Accuracy(name, threat, attack), seed)

    def _matching(self, accuracy: Accuracy, seed: int) -> list[Record]:
        """Return the records that measure an accuracy, on the images that are here now under the data set's name."""
        found = settlement.matching(self.records, accuracy, self.dataset_name, self.scale, seed)
        try:
            return [r for r in found if r.dataset.fingerprint == self._split.fingerprint]
        except UserError:
            # Without the data nobody knows of others.
            return found

    def find(self, accuracy: Accuracy, seed: int) -> Sequence[Record]:
        """Return the records of an accuracy, measuring what it needs and is missing."""
        if not self.settled_by_records(accuracy, seed):
            needed = self.needed(accuracy)
            # What is recorded may be of other weights than what is measured, and is measured again then.
            for _ in range(2):
                for name, threat, attack in needed:
                    self.measured(name, threat, attack, seed)
                self.forget_mixed([(*need, seed) for need in needed])
        return self._matching(accuracy, seed)

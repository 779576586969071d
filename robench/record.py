"""Records: one measurement each, as a JSON file that is checked when it is read.

A record keeps the outcome of every example, so that any two of the same data are compared example by example.
"""

import hashlib
import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from robench.errors import UserError
from robench.estimate import Estimate
from robench.files import write_atomic
from robench.parameters import Value
from robench.threat import ThreatModel

Scale = Literal["smoke", "cpu", "gpu", "paper"]


def _utc(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError(f"{text!r} is not a time in UTC, as in 2025-01-31T12:00:00+00:00")
    return text


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Threat = Annotated[str, AfterValidator(lambda text: str(ThreatModel.parse(text)))]
Time = Annotated[str, AfterValidator(_utc)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DefenseInfo(_Model):
    """What was attacked: its full name with all parameters, its version, and the hash of its weights."""

    name: str
    version: int
    origin: str
    paper: str
    random: bool
    members: Positive
    parameters: Count
    weights_sha256: Sha256
    training_seed: int


class DatasetInfo(_Model):
    """The first `n` examples of a split; the fingerprint is the whole split's."""

    name: str
    split: str
    fingerprint: Sha256
    n: Positive
    classes: Positive


class AttackInfo(_Model):
    """An attack: its name as typed (``pgd-20``), its version, and all its parameters."""

    name: str
    version: int
    parameters: dict[str, Value]


class Proportion(_Model):
    """A share in [0, 1] of n examples with its 95 % interval."""

    value: Share
    low: Share
    high: Share
    n: Positive

    @classmethod
    def of(cls, estimate: Estimate) -> "Proportion":
        """Return what a record keeps of an estimated share."""
        return cls(value=estimate.value, low=estimate.low, high=estimate.high, n=estimate.n)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the value {self.value} is not in its interval [{self.low}, {self.high}]")
        return self

    def differs(self, other: "Proportion") -> bool:
        """Say whether a number differs from the other's by more than rounding."""
        mine, others = (self.value, self.low, self.high), (other.value, other.low, other.high)
        return self.n != other.n or any(abs(a - b) > 1e-9 for a, b in zip(mine, others, strict=True))


class CostPerImage(_Model):
    """Passes of the attack through the members, for each image."""

    forwards: Annotated[float, Field(ge=0)]
    backwards: Annotated[float, Field(ge=0)]


class Outcomes(_Model):
    """For each example, in order, the share of scoring draws that classify it correctly: 0 or 1 without randomness."""

    clean: list[Share]
    robust: list[Share]


class RandomScore(_Model):
    """The robust accuracy of a random defense over fresh draws: their mean, the majority vote, and the worst draw.

    `own_count` is the share that the attack itself counts as robust, where it makes a count, and `own_stages` how many examples it
    counts after each of its stages, ``clean`` (before any) first. AutoAttack lets an example have one wrong draw, and several
    chances to have it, so its count lies below the mean over fresh draws of the images that it returns; papers report either.
    """

    draws: Positive
    mean: Proportion
    majority: Proportion
    worst: Proportion
    own_count: Proportion | None = None
    own_stages: dict[str, Count] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _counts_end_in_the_share(self) -> Self:
        counts, own = list(self.own_stages.values()), self.own_count
        if counts and (own is None or own.n != self.mean.n or abs(own.value - counts[-1] / own.n) > 1e-9):
            raise ValueError(f"own_count ({own}) is not the share of {self.mean.n} examples that own_stages {self.own_stages} end with")
        if counts != sorted(counts, reverse=True):
            raise ValueError(f"own_stages {self.own_stages} rise from one stage to the next")
        return self


class Provenance(_Model):
    """What computed something: source, library versions and hardware."""

    commit: str
    dirty: bool
    versions: dict[str, str]
    device: str
    processor: str
    threads: Positive


class Timing(_Model):
    """When the last of the measurement was done (ISO 8601, UTC) and how long all of it took, in seconds of wall time."""

    created: Time
    seconds: Annotated[float, Field(ge=0)]


class Record(_Model):
    """One measurement: a defense under an attack. Its accuracies must be those of its outcomes.

    `stages` tells, for an attack of several stages, how many examples each was the first to fool, in the order run. Where an interrupted
    measurement went on with another commit or on another machine, `other_provenance` tells of the others that made parts of it, and
    `provenance` of one with uncommitted changes where there was such, else of the first.
    """

    schema_version: Literal[1] = 1
    defense: DefenseInfo
    dataset: DatasetInfo
    threat: Threat
    attack: AttackInfo
    scale: Scale
    seed: int
    clean_accuracy: Proportion
    robust_accuracy: Proportion
    cost: CostPerImage
    outcomes: Outcomes
    stages: dict[str, Count] = Field(default_factory=dict)
    random_score: RandomScore | None = None
    controls: dict[str, float] = Field(default_factory=dict)
    training: dict[str, Value] | None = None
    precision: str
    partial: str | None = None
    provenance: Provenance
    other_provenance: list[Provenance] = Field(default_factory=list)
    timing: Timing

    @property
    def hardware(self) -> str:
        """The processors that the measurement was made on."""
        return ", ".join(dict.fromkeys(made.processor for made in (self.provenance, *self.other_provenance)))

    @property
    def parts(self) -> str | None:
        """What made the parts of the measurement, in one line; None where one process could have made all."""
        made = [self.provenance, *self.other_provenance]
        return "; ".join(map(_described, made)) if len(made) > 1 else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind, outcomes, stated in (
            ("clean", self.outcomes.clean, self.clean_accuracy),
            ("robust", self.outcomes.robust, self.robust_accuracy),
        ):
            if len(outcomes) != self.dataset.n:
                raise ValueError(f"{len(outcomes)} {kind} outcomes for {self.dataset.n} examples")
            if stated.differs(counted := Proportion.of(Estimate.of(outcomes))):
                raise ValueError(f"the {kind} accuracy ({stated}) is not that of the outcomes ({counted})")
            if not self.defense.random and not {0, 1}.issuperset(outcomes):
                raise ValueError(f"a {kind} outcome of a deterministic defense is neither 0 nor 1")
        if self.defense.random != (self.random_score is not None):
            raise ValueError("a random defense, and no other, has a random_score (mean, majority and worst draw)")
        if self.random_score and self.random_score.mean.differs(self.robust_accuracy):
            raise ValueError("the robust accuracy of a random defense is its mean over draws; random_score.mean differs")
        return self


def identity(record: Record) -> str:
    """Return the SHA-256 (hexadecimal) of what was measured and found: all but the time it took and the commit.

    The same command on the same machine gives the same identity.
    """
    kept = record.model_dump(mode="json", exclude={"timing": True, "provenance": {"commit", "dirty"}, "other_provenance": True})
    others = [made.model_dump(mode="json", exclude={"commit", "dirty"}) for made in record.other_provenance]
    # Another commit on the same machine is left out, as above.
    if others := [other for i, other in enumerate(others) if other not in [kept["provenance"], *others[:i]]]:
        kept["other_provenance"] = others
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_name(record: Record) -> str:
    """Return the record's file name, the same for a repeated or newer measurement of the same thing.

    ``<dataset>_<threat>_<defense>_<attack>_<scale>_n<N>_s<seed>t<training seed>_<digest>.json``, in characters that
    every file system takes; the 8 digits of the digest tell apart what the readable parts do not (attack parameters,
    the split, long names, the weights of a defense from elsewhere).
    """
    exact = [record.dataset.name, record.dataset.split, record.threat, record.defense.name]
    exact += [record.attack.name, json.dumps(record.attack.parameters, sort_keys=True)]
    # Two files' models may have one name; the zoo's names are its own.
    exact += [record.defense.weights_sha256] if record.defense.origin != "zoo" else []
    readable = [record.dataset.name, record.threat, record.defense.name, record.attack.name]
    parts = [re.sub(r"[^A-Za-z0-9.,=+-]+", "-", text.replace("_", "-"))[:48] for text in readable]
    seeds = f"s{record.seed}t{record.defense.training_seed}"
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:8]
    return "_".join([*parts, record.scale, f"n{record.dataset.n}", seeds, digest]) + ".json"


def save(record: Record, folder: Path) -> Path:
    """Write the record into `folder` under its file name and return the path; the file is whole or absent.

    Raises:
        UserError: if the folder cannot be written.
    """
    path = folder / file_name(record)
    write_atomic(path, to_json(record))
    return path


def to_json(record: Record) -> str:
    """Return the record as JSON of one line per value, but one line for each list of outcomes."""
    unsaid = {"outcomes"} if record.other_provenance else {"outcomes", "other_provenance"}
    head = json.dumps(record.model_dump(mode="json", exclude=unsaid), indent=1).removesuffix("\n}")
    lists = {"clean": record.outcomes.clean, "robust": record.outcomes.robust}
    lines = [
        f'  "{name}": {json.dumps([int(v) if v in (0, 1) else v for v in values], separators=(",", ":"))}' for name, values in lists.items()
    ]
    return head + ',\n "outcomes": {\n' + ",\n".join(lines) + "\n }\n}\n"


def load(path: Path) -> Record:
    """Read and check one record.

    Raises:
        UserError: if the file cannot be read or is not a valid record, with the first reason.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the record {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_context=False)
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        rest = f" (and {len(more)} more)" if more else ""
        raise UserError(f"{path} is not a valid record: {place + ': ' if place else ''}{reason}{rest}") from None


def load_folder(folder: Path) -> list[Record]:
    """Read every record (``*.json``) in `folder`, sorted by file name.

    Raises:
        UserError: if the folder does not exist or a file in it is not a valid record.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of records {folder} does not exist")
    return [load(path) for path in sorted(folder.glob("*.json"), key=lambda path: path.name)]


def _described(made: Provenance) -> str:
    changes = " with uncommitted changes" if made.dirty else ""
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    return f"commit {made.commit[:12]}{changes} on {made.device} ({made.processor}, threads: {made.threads}; {versions})"

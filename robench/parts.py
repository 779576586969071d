"""What an evaluation is made of and keeps in its cache: chunks of examples and controls, each with what made it and when.

A record may be put together from parts that other commits and machines have made; its provenance is that of its parts.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from robench.errors import UserError
from robench.files import write_atomic
from robench.record import Provenance, Time

Predictions = Annotated[list[Annotated[list[NonNegativeInt], Field(min_length=1)]], Field(min_length=1)]
"""Classes (draws, B) by draw and example."""


class Part(BaseModel):
    """Something that was computed: by what, and when it was done."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    provenance: Provenance
    created: Time = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class Chunk(Part):
    """The outcome of some consecutive examples: predictions (draws, B) on clean and adversarial images, cost and seconds.

    `stages` tells how many of them each stage of the attack was the first to fool, and `counted` how many the attack itself
    still counts as robust after each, where it makes a count of its own.
    """

    clean: Predictions
    robust: Predictions
    forwards: NonNegativeInt
    backwards: NonNegativeInt
    seconds: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
    stages: dict[str, int] = Field(default_factory=dict)
    counted: dict[str, int] = Field(default_factory=dict)

    def fits(self, examples: int, classes: int) -> bool:
        """Say whether there is one prediction of each draw, and one of the data set's classes, for so many examples."""
        rows = [*self.clean, *self.robust]
        return len(self.clean) == len(self.robust) and all(len(row) == examples and max(row) < classes for row in rows)


class Controls(Part):
    """A random defense's controls, as a record keeps them."""

    readings: dict[str, float]


P = TypeVar("P", bound=Part)


def load(path: Path | None, kind: type[P]) -> P | None:
    """Return the part that a file keeps; None if there is no file, or one of an earlier version that does not say what made it.

    Raises:
        UserError: if the file is corrupt.
    """
    if path is None or not path.exists():
        return None
    try:
        text = path.read_text()
        kept = json.loads(text)
        if isinstance(kept, dict) and "provenance" not in kept:
            return None
        return kind.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors(include_url=False, include_context=False)[0]["msg"]
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path} is corrupt ({reason}); delete it to measure again")


def save(part: Part, path: Path) -> None:
    """Keep a part in a file, which is whole or absent.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomic(path, part.model_dump_json())


def provenances(parts: Sequence[Part]) -> list[Provenance]:
    """Return what made the parts, each once: first where there were uncommitted changes, then by when it first made one."""
    made: list[Provenance] = []
    for part in sorted(parts, key=lambda part: (not part.provenance.dirty, part.created)):
        if part.provenance not in made:
            made.append(part.provenance)
    return made

"""Plans: which defenses are to be put to which attacks, as a TOML file.

dataset = "cifar10"
scale = "cpu"
seeds = 1                     # independently trained copies of each defense
n = 1000                      # test examples
claims = true                 # everything that the claims of this data set and scale need

[[measure]]
defenses = ["natural"]        # by name,
papers = ["revisiting_ensembles"]    # or all of a paper
threats = ["L2:0.5"]
attacks = ["fast", "adaptive"]
n = 500                       # instead of the plan's
"""

import tomllib
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from robench import attacks, parameters, zoo
from robench.errors import UserError, nearest
from robench.threat import ThreatModel
from robench.workbench import EXAMPLES
from robench.zoo import Scale


def defense_name(text: str) -> str:
    """Return a defense's full name, the same for every way to write it; raises UserError where there is none."""
    return zoo.parse(text).text


def threat_name(text: str) -> str:
    """Return a threat model's text, the same for every way to write it; raises UserError where it is none."""
    return str(ThreatModel.parse(text))


def attack_name(text: str) -> str:
    """Return an attack's name with the parameters that are not the default; raises UserError where there is none."""
    attack = attacks.parse(text)
    default = attacks.parse(attack.name).parameters
    return parameters.written(attack.name, {key: value for key, value in attack.parameters.items() if value != default[key]})


def _paper(slug: str) -> str:
    known = sorted({entry.paper.slug for entry in zoo.entries().values()})
    if slug not in known:
        raise UserError(f"no defense of the zoo is of the paper {slug!r}{nearest(slug, known)}; there are {', '.join(known)}")
    return slug


def _dataset(name: str) -> str:
    if not name:
        raise UserError("a data set has a name; see robench data list")
    return name


Positive = Annotated[int, Field(ge=1)]
Names = list[str]


def _each(check: Callable[[str], str], names: Names) -> Names:
    return [check(name) for name in names]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Measure(_Table):
    """Every one of these defenses, within every threat model, under every attack; names are full ones.

    Attributes:
        defenses: of the zoo, with parameters.
        papers: slugs; all the defenses of each, with their default parameters.
        threats: threat models.
        attacks: attacks, with parameters.
        n: test examples; None takes the plan's.
    """

    defenses: Annotated[Names, AfterValidator(partial(_each, defense_name))] = []
    papers: Annotated[Names, AfterValidator(partial(_each, _paper))] = []
    threats: Annotated[Names, Field(min_length=1), AfterValidator(partial(_each, threat_name))]
    attacks: Annotated[Names, Field(min_length=1), AfterValidator(partial(_each, attack_name))]
    n: Positive | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.defenses and not self.papers:
            raise ValueError("name defenses or papers")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of all its defenses, each once."""
        of_papers = [defense_name(name) for name, entry in zoo.entries().items() if entry.paper.slug in self.papers]
        return tuple(dict.fromkeys([*self.defenses, *of_papers]))


class Plan(_Table):
    """What a campaign is to measure.

    Attributes:
        dataset: the data set's name.
        scale: the scale.
        seeds: independently trained copies of each defense, numbered from 0.
        n: test examples, or all where there are fewer; the scale's number by default.
        claims: whether everything that the claims of this data set and scale need is added.
        measure: what else is to be measured.
    """

    dataset: Annotated[str, AfterValidator(_dataset)]
    scale: Scale
    seeds: Positive = 1
    n: Positive | None = None
    claims: bool = False
    measure: list[Measure] = []

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.claims and not self.measure:
            raise ValueError("there is nothing to measure; set claims = true, or add a table [[measure]]")
        return self

    @property
    def examples(self) -> int:
        """The test examples of what has no number of its own."""
        return self.n or EXAMPLES[self.scale]


def shipped() -> dict[str, Path]:
    """Return the plans that come with the suite, by name."""
    folder = Path(str(resources.files("robench") / "plans"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(text: str) -> Plan:
    """Return the plan that `text` names: one that comes with the suite, or a TOML file.

    Raises:
        UserError: if there is none, or it is no valid plan, naming the key.
    """
    path = shipped().get(text) or Path(text)
    try:
        return Plan.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        known = ", ".join(shipped())
        raise UserError(f"there is no plan {text!r}: it is no file, and those that ship are {known}{nearest(text, shipped())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror if isinstance(error, OSError) else error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the plan {path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"the plan {path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None

"""Attacks by name: ``pgd-20,restarts=5`` is the attack `pgd` with 20 steps and 5 restarts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from robench import plugins
from robench.defense import Defense
from robench.errors import UserError, nearest
from robench.parameters import Value, check_registration, keyword_parameters, read_settings
from robench.threat import ThreatModel


@dataclass(frozen=True)
class Found:
    """What an attack of several stages found.

    Attributes:
        x_adv: adversarial images (B, C, H, W).
        stages: by stage, in the order run, bool (B,): the examples that it was the first to fool.
        counted: the attack's own count, where it makes one of a random defense: by stage, ``clean`` (before any) first, bool (B,):
            the examples that it still counts as robust, having drawn once more.
    """

    x_adv: Tensor
    stages: Mapping[str, Tensor] = field(default_factory=dict)
    counted: Mapping[str, Tensor] = field(default_factory=dict)


AttackFunction = Callable[..., Tensor | Found]
"""What every attack is: a pure function ``(defense, x, y, threat, *, examples, seed, ...) -> x_adv`` that returns one
adversarial image for each image, inside the threat model, or `Found` where it has stages to tell of. Its further keyword
parameters are its own."""

Apply = Callable[[Tensor, ThreatModel, Tensor], Tensor]
"""From images (B, C, H, W), the threat model and what an attack learnt to adversarial images."""


@dataclass(frozen=True)
class RegisteredAttack:
    """One attack: its function, version (raise it when its results change), paper, and what a number in its name sets.

    `random_version` is its version on random defenses, for one whose results changed there alone; else the same.

    An attack with `apply` learns from training images before it is run on others: its function
    ``(defense, x, y, threat, *, seed, ...)`` returns what it learnt, and ``apply(x, threat, learnt)`` the adversarial images.
    """

    name: str
    function: AttackFunction
    version: int
    paper: str
    number: str | None = None
    apply: Apply | None = None
    random_version: int | None = None

    def version_on(self, random: bool) -> int:
        """Return the version on a random defense or a deterministic one."""
        return self.version if self.random_version is None or not random else self.random_version

    def defaults(self) -> dict[str, Value]:
        """Return the keyword parameters and their defaults, without what every attack takes."""
        return keyword_parameters(self.function, without=("examples", "seed"))

    @property
    def pattern(self) -> str:
        """The name as a user types it, ``pgd-N`` for a numbered attack."""
        return f"{self.name}-N" if self.number else self.name


@dataclass(frozen=True)
class Attack:
    """An attack with all its parameters, ready to run and to be recorded; `random_version` is its version on random defenses."""

    name: str
    version: int
    parameters: Mapping[str, Value]
    function: AttackFunction = field(repr=False, compare=False)
    apply: Apply | None = field(default=None, repr=False, compare=False)
    learnt: Tensor | None = field(default=None, repr=False, compare=False)
    random_version: int | None = None

    @property
    def batch_size(self) -> int | None:
        """The images attacked together by an attack whose result depends on it, a parameter of that name; None for any other.

        Such an attack is another's code, and is run as it was published: in float32, on the defense as it is.
        """
        return int(size) if (size := self.parameters.get("batch_size")) else None

    def version_on(self, random: bool) -> int:
        """Return the version on a random defense or a deterministic one."""
        return self.version if self.random_version is None or not random else self.random_version

    def fitted(self, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int) -> "Attack":
        """Return the attack with what it learns from training images `x` (N, C, H, W) with labels `y`; itself if it learns nothing."""
        if self.apply is None:
            return self
        with torch.enable_grad():
            learnt = self.function(defense, x, y, threat, seed=seed, **self.parameters)
        return replace(self, learnt=learnt if isinstance(learnt, Tensor) else learnt.x_adv)

    def __call__(self, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int) -> Tensor:
        """Return adversarial images (B, C, H, W) for clean images `x` (B, C, H, W) in [0, 1] with labels `y` (B,).

        Args:
            defense: the model under attack, in evaluation mode.
            x: clean images.
            y: int64 labels.
            threat: what the attack may change.
            examples: int64 (B,) identities of the examples; all randomness comes from them and `seed`.
            seed: the attack's seed.
        """
        return self.run(defense, x, y, threat, examples=examples, seed=seed).x_adv

    def run(self, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int) -> Found:
        """Return the adversarial images and what each stage of the attack found; the arguments are those of a call."""
        if self.apply is not None:
            if self.learnt is None:
                raise UserError(f"attack {self.name!r} has to be fitted on training images first (Attack.fitted)")
            return Found(self.apply(x, threat, self.learnt))
        # A caller may have turned gradients off.
        with torch.enable_grad():
            found = self.function(defense, x, y, threat, examples=examples, seed=seed, **self.parameters)
        found = Found(found) if isinstance(found, Tensor) else found
        if not isinstance(found, Found):
            raise UserError(f"attack {self.name!r} returns {type(found).__name__}; an attack returns images as a tensor, or a Found")
        return replace(found, x_adv=found.x_adv.to(x.dtype)) if found.x_adv.dtype != x.dtype else found


F = TypeVar("F", bound=AttackFunction)

GROUP = "robench.attacks"
_ATTACKS: dict[str, RegisteredAttack] = {}
plugins.track(lambda: _ATTACKS)


def register(
    name: str, *, version: int, paper: str, number: str | None = None, apply: Apply | None = None, random_version: int | None = None
) -> Callable[[F], F]:
    """Register an attack function under `name`; `number` names the parameter that ``NAME-N`` sets, `apply` is given for one that
    learns from training images, and `random_version` for one of another version on random defenses (see `RegisteredAttack`).

    Raises:
        UserError: if the name is taken, the version is none, or the function cannot be called as an attack is.
    """

    def add(function: F) -> F:
        if name in _ATTACKS:
            raise UserError(f"the attack name {name!r} is taken by {_ATTACKS[name].function.__module__}")
        named = (() if apply else ("examples",)) + ("seed",) + ((number,) if number else ())
        check_registration(f"attack {name!r}", function, version, ("defense", "x", "y", "threat"), named)
        _ATTACKS[name] = RegisteredAttack(name, function, version, paper, number, apply, random_version)
        return function

    return add


def registered() -> dict[str, RegisteredAttack]:
    """Return every registered attack by its name (without a number), those of the entry point group ``robench.attacks`` included."""
    plugins.discover(GROUP)
    return dict(sorted(_ATTACKS.items()))


def current_version(name: str, random: bool) -> int | None:
    """Return the version now of the attack that a record names (``pgd-20``), on a random defense or not; None if there is none."""
    known = registered()
    head = name.partition(",")[0]
    pattern, _, number = head.rpartition("-")
    found = known.get(pattern if head not in known and number.isdecimal() else head)
    return None if found is None else found.version_on(random)


def parse(text: str) -> Attack:
    """Read an attack's name and parameters: ``fgsm``, ``pgd-20``, ``pgd-20,restarts=5,loss=margin``.

    Raises:
        UserError: for an unknown attack or parameter (naming the nearest), a missing number, or a value of the wrong type.
    """
    plugins.discover(GROUP)
    head, *settings = text.split(",")
    attack, number = _split_number(head)
    parameters = attack.defaults()
    if attack.number:
        parameters[attack.number] = number
    known = {key: value for key, value in parameters.items() if key != attack.number}
    parameters |= read_settings(f"attack {attack.pattern!r}", attack.function, settings, known)
    for key, least in known.items():
        if type(least) is int and least > 0 and int(parameters[key] or 0) < 1:
            raise UserError(f"attack {attack.pattern!r}: {key} must be at least 1, not {parameters[key]}")
        if attack.function.__module__.startswith("robench.") and not _in_range(key, parameters[key]):
            raise UserError(f"attack {attack.pattern!r}: {key} must be {RANGES[key][2]}, not {parameters[key]}")
    return Attack(head, attack.version, parameters, attack.function, attack.apply, random_version=attack.random_version)


RANGES: dict[str, tuple[float, float, str]] = {
    "step_size": (1e-30, math.inf, "above 0"), "eta": (1e-30, math.inf, "above 0"), "finetune": (0, math.inf, "at least 0"),
    **dict.fromkeys(("alpha_max", "rho", "p_init"), (1e-30, 1, "above 0 and at most 1")),
}  # fmt: skip
"""The least and the most that parameters of robench's attacks may be, and in words: beyond, an attack would be none."""


def _in_range(key: str, value: Value) -> bool:
    if key not in RANGES or value is None or isinstance(value, str):
        return True
    least, most, _ = RANGES[key]
    return least <= value <= most


def _split_number(head: str) -> tuple[RegisteredAttack, int | None]:
    if head in _ATTACKS and _ATTACKS[head].number is None:
        return _ATTACKS[head], None
    name, _, digits = head.rpartition("-")
    if name in _ATTACKS and _ATTACKS[name].number and digits.isascii() and digits.isdigit() and int(digits) > 0:
        return _ATTACKS[name], int(digits)
    if head in _ATTACKS or name in _ATTACKS:
        pattern = _ATTACKS[head if head in _ATTACKS else name].pattern
        number = " with N a positive whole number" if "-N" in pattern else ""
        raise UserError(f"attack {head!r} should read {pattern!r}{number}")
    patterns = [a.pattern for a in registered().values()]
    raise UserError(f"unknown attack {head!r}; known: {', '.join(patterns)}{nearest(head, patterns)}")

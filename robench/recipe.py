"""Recipes: how a stage of a defense's training goes, as data."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robench.errors import UserError
from robench.parameters import Value
from robench.threat import ThreatModel

Precision = Literal["float32", "bfloat16"]


def _at_least(least: float, owner: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not least <= value < math.inf:
            raise UserError(f"{owner}'s {name} is {value}; it has to be a finite number of at least {least}")


@dataclass(frozen=True)
class InnerAttack:
    """The attack inside adversarial training, on the defense as one model.

    Attributes:
        threat: the threat model's text form, ``Linf:8/255``.
        steps: steepest-ascent steps.
        step_size: in units of the pixel range.
        start: the clean image, a uniform point of the ball, Gaussian noise of half the budget per value, projected (arXiv 1811.09300,
            Algorithm 1; its variance is not stated there), or ``near``: Gaussian noise of 0.001 (arXiv 1901.08573, released code).
        objective: what is raised: the cross-entropy, or the divergence from the clean image's prediction (arXiv 1901.08573, Algorithm 1).
        mode: of the batch norm while attacking; in training mode it normalises by the batch, and its statistics see the attack's steps.
    """

    threat: str
    steps: int
    step_size: float
    start: Literal["clean", "uniform", "gaussian", "near"]
    objective: Literal["cross-entropy", "divergence"] = "cross-entropy"
    mode: Literal["evaluation", "training"] = "evaluation"

    def __post_init__(self) -> None:
        ThreatModel.parse(self.threat)
        _at_least(0, "an inner attack", steps=self.steps, step_size=self.step_size)


@dataclass(frozen=True)
class Recipe:
    """How a stage trains.

    Attributes:
        epochs: passes over the training set.
        learning_rate: the peak rate.
        schedule: ``one-cycle`` (linear up for 30 % of the steps, linear down), ``constant``, ``step`` (x 0.1 at each third),
            ``late-step`` (x 0.1 at 75 % and at 90 %), ``early-step`` (x 0.2 at 6, 12 and 18 %), or ``cosine`` (half a cosine from the
            peak to zero).
        optimiser: SGD with Nesterov momentum 0.9, or Adam.
        batch_size: images of one step.
        weight_decay: on all trained parameters.
        attack: None trains on clean images alone.
        clean_weight: weight of the clean loss beside the adversarial loss of weight one; 1 is rho = 1 of arXiv 1811.09300, 0 trains
            on adversarial images alone.
        loss_on: cross-entropy of the defense's prediction, or the mean cross-entropy of its predictors, each on its own.
        augmentation: random crop (an eighth of the side as padding) and flip; digits and letters must not be flipped.
        precision: ``bfloat16`` trains under autocast where the hardware computes it natively, else in float32.
        trades: above 0, the loss is the clean cross-entropy plus this times the divergence of the adversarial from the clean
            prediction: 1 / lambda of arXiv 1901.08573, equation 5.
        averaging: above 0, what is kept is the exponential moving average of weights and batch norm statistics, with this decay a step.

    Raises:
        UserError: for a number out of its range, or parts that contradict each other.
    """

    epochs: int
    learning_rate: float
    schedule: Literal["one-cycle", "constant", "step", "late-step", "early-step", "cosine"] = "one-cycle"
    optimiser: Literal["sgd", "adam"] = "sgd"
    batch_size: int = 128
    weight_decay: float = 5e-4
    attack: InnerAttack | None = None
    clean_weight: float = 0.0
    loss_on: Literal["prediction", "predictors"] = "prediction"
    augmentation: Literal["none", "crop", "crop-flip"] = "crop-flip"
    precision: Precision = "float32"
    trades: float = 0.0
    averaging: float = 0.0

    def __post_init__(self) -> None:
        _at_least(1, "a recipe", epochs=self.epochs, batch_size=self.batch_size)
        _at_least(
            0,
            "a recipe",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clean_weight=self.clean_weight,
            trades=self.trades,
        )
        if self.trades and (self.attack is None or self.clean_weight or self.loss_on != "prediction"):
            raise UserError("a recipe with trades above 0 needs an attack, clean_weight 0 and the loss on the prediction")
        if not 0 <= self.averaging < 1:
            raise UserError(f"a recipe's averaging is {self.averaging}; the decay of a moving average is at least 0 and below 1")


@dataclass(frozen=True)
class Stage:
    """One stage of a defense's training.

    Attributes:
        recipe: how.
        seed: of the data order, augmentation and attack starts.
        module: dotted path of the module to train within the defense; empty for the defense as a whole.
        trainable: dotted paths within that module whose parameters learn; empty for all. The rest is frozen, in evaluation mode.
    """

    recipe: Recipe
    seed: int
    module: str = ""
    trainable: tuple[str, ...] = ()


_LATER = {"trades": 0.0, "averaging": 0.0}
_LATER_OF_ATTACK = {"objective": "cross-entropy", "mode": "evaluation"}


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data.

    What recipes could not say when the first weights were kept is left out where it says the same, so that those keep their names.
    """
    data = dataclasses.asdict(recipe)
    for fields, later in ((data, _LATER), (data["attack"] or {}, _LATER_OF_ATTACK)):
        for name, default in later.items():
            if fields.get(name) == default:
                del fields[name]
    return data


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of one of a stage's `steps`, counted from 0."""
    done = (step + 1) / steps
    match recipe.schedule:
        case "one-cycle":
            factor = min(done / 0.3, (1 - done) / 0.7 + 1 / steps)
        case "step":
            factor = 0.1 ** int(3 * step / steps)
        case "late-step":
            factor = 0.1 ** ((step >= 0.75 * steps) + (step >= 0.9 * steps))
        case "early-step":
            factor = 0.2 ** sum(step >= share * steps for share in (0.06, 0.12, 0.18))
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / steps))
        case _:
            factor = 1.0
    return recipe.learning_rate * factor


def with_epochs(stages: Sequence[Stage], epochs: int) -> tuple[Stage, ...]:
    """Return stages whose first one trains for so many epochs, and the others in proportion, one epoch at least."""
    usual = stages[0].recipe.epochs if stages else 1
    return tuple(
        dataclasses.replace(stage, recipe=dataclasses.replace(stage.recipe, epochs=max(1, round(epochs * stage.recipe.epochs / usual))))
        for stage in stages
    )


def summary(stages: Sequence[Stage], precisions: Sequence[Precision]) -> dict[str, Value]:
    """Return what was trained how, and in which precision, a line per stage."""
    lines: dict[str, Value] = {}
    for number, (stage, trained_in) in enumerate(zip(stages, precisions, strict=True)):
        recipe, fields = stage.recipe, plain(stage.recipe)
        attack = "clean images" if recipe.attack is None else " ".join(f"{k}={v}" for k, v in fields["attack"].items())
        part = ",".join(stage.trainable) or "all"
        lines[f"stage {number + 1}"] = (
            f"{stage.module or 'whole'}/{part}: {recipe.epochs} epochs, {recipe.optimiser} {recipe.learning_rate} {recipe.schedule}, "
            f"batch {recipe.batch_size}, {attack}, clean weight {recipe.clean_weight}, {trained_in}"
            + "".join(f", {name} {fields[name]}" for name in _LATER if name in fields)
        )
    return lines

"""What the doctor's checks share: the examples classified right, gradients of the defense there, and attacks run once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.objective import Point, evaluate_point
from robench.attacks.pgd import best_of, default_step_size, path, untargeted_plan
from robench.attacks.steps import steepest
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.errors import UserError
from robench.estimate import Estimate
from robench.losses import Loss, loss_named
from robench.noise import Draw
from robench.scoring import predictions
from robench.threat import ThreatModel

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What one attack left.

    Attributes:
        correct: float64 (B,) 1 where the example withstood, 0 where not; for a random defense its share over fresh draws.
        every_draw: float64 (B,) 1 where it withstood on every one of those draws.
        losses: (B, steps + 1) the loss on the attacked model at each iterate; (B, 0) where the attack does not tell.
        threat: what it was allowed to change.
    """

    correct: Tensor
    every_draw: Tensor
    losses: Tensor
    threat: ThreatModel

    @property
    def share(self) -> float:
        """The robust accuracy on these examples."""
        return float(self.correct.mean())

    @property
    def estimate(self) -> Estimate:
        """The robust accuracy on these examples with its interval; two of them are compared pairwise."""
        return Estimate.of(self.correct.numpy())


class Member(Defense):
    """One predictor of a defense alone: what it says before anything is combined."""

    def __init__(self, defense: Defense, index: int) -> None:
        super().__init__()
        self.defense = defense
        self.index = index
        self.random = defense.random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the one predictor's logits: (B, C, H, W) -> (B, 1, classes)."""
        return self.defense.predictors(x, draw)[:, self.index : self.index + 1]

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the one predictor's logits: (B, 1, classes) -> (B, classes)."""
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        """Return the defense's own members."""
        return self.defense.members()


@dataclass(eq=False)
class Examination:
    """A defense before the doctor, on the examples that it classifies right (a random one: on most of its draws).

    Attributes:
        defense: in evaluation mode.
        x: (B, C, H, W) clean images, B at least 1.
        y: (B,) labels.
        examples: (B,) identities.
        threat: the threat model, its budget above 0.
        seed: of all attacks and directions.
        clean: the clean accuracy on all examples.
        batch_size: examples that go through the defense together.
        progress: is told each attack.
    """

    defense: Defense
    x: Tensor
    y: Tensor
    examples: Tensor
    threat: ThreatModel
    seed: int
    clean: Estimate
    batch_size: int = 100
    progress: Progress = lambda _line: None
    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def of(
        cls, defense: Defense, dataset: Dataset, threat: ThreatModel, seed: int, device: str, batch_size: int, progress: Progress
    ) -> "Examination":
        """Take the examples that the defense classifies right.

        Raises:
            UserError: if there is none.
        """
        x, y = as_float(dataset.images).to(device), dataset.labels.to(device)
        examples = torch.arange(len(x), device=device)
        chunks = zip(x.split(batch_size), examples.split(batch_size), strict=True)
        predicted = torch.cat([predictions(defense, *chunk, seed) for chunk in chunks], dim=1)
        correct = (predicted == y).double().mean(0)
        right = correct > 0.5
        if not bool(right.any()):
            raise UserError(f"there is nothing to examine: none of the first {len(x)} examples of {dataset.name} is classified right")
        clean = Estimate.of(correct.cpu().numpy())
        return cls(defense, x[right], y[right], examples[right], threat, seed, clean, batch_size, progress)

    def __len__(self) -> int:
        return len(self.y)

    def draw(self, examples: Tensor, number: int = 0) -> Draw | None:
        """Return a draw for these examples; none for a deterministic defense."""
        return Draw(self.seed, examples, number) if self.defense.random else None

    def batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the parts of tensors (B, ...) that go through the defense together."""
        yield from zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)

    @torch.no_grad()
    def logits(self, x: Tensor, model: Defense | None = None, number: int = 0) -> Tensor:
        """Return the logits (B, classes) at images `x` of the defense, or of another model, on one draw."""
        chosen = model or self.defense
        return torch.cat([chosen(images, self.draw(names, number)).float() for images, names in self.batches(x, self.examples)])

    def losses(self, x: Tensor, loss: str = "margin", number: int = 0) -> Tensor:
        """Return the loss (B,) at images `x` on one draw."""
        return loss_named(loss)(self.logits(x, number=number), self.y)

    def gradient(self, x: Tensor, loss: str = "margin", model: Defense | None = None, number: int = 0) -> Tensor:
        """Return the loss's gradient (B, C, H, W) at images `x` on one draw, as it is: zero, NaN or infinite."""
        function = loss_named(loss)
        parts = []
        for images, y, names in self.batches(x, self.y, self.examples):
            objective = partial(_loss_of, function, y)
            numbers = range(number, number + 1)
            point = evaluate_point(model or self.defense, images, y, objective, examples=names, seed=self.seed, numbers=numbers, as_is=True)
            parts.append(point.gradient)
        return torch.cat(parts)

    def pgd(
        self,
        steps: int,
        *,
        loss: str = "ce",
        draws: int = 1,
        restart: int = 0,
        threat: ThreatModel | None = None,
        from_clean: bool = False,
        surrogate: tuple[str, Defense] | None = None,
    ) -> Run:
        """Run PGD once, or return what it left if these settings ran before.

        Args:
            steps: of size ``2.5 * budget / steps``.
            loss: what it ascends.
            draws: averaged at each step, for a random defense.
            restart: tells random starts apart.
            threat: the threat model, the examination's own by default.
            from_clean: start at the clean image.
            surrogate: a name and a model to attack in the defense's place.
        """
        within = threat or self.threat
        name = f"pgd-{steps} {loss}, {draws} draws, restart {restart}, {within}" + ", from clean" * from_clean
        if surrogate:
            name += f", on {surrogate[0]}"
        if name in self.runs:
            return self.runs[name]
        self.progress(name)
        size = default_step_size(within, steps, None)
        model = surrogate[1] if surrogate else self.defense

        def update(x_adv: Tensor, gradient: Tensor) -> Tensor:
            # A gradient that is not finite would end every later step, and is a finding of its own.
            return x_adv + size * steepest(gradient.nan_to_num(0, 0, 0), within.norm, x_adv)

        plan, parts, losses = untargeted_plan(loss, steps, draws), [], []
        for x, y, names in self.batches(self.x, self.y, self.examples):
            start = x if from_clean else within.random_start(x, names, self.seed, f"start/{restart}")
            noted: list[Tensor] = []
            iterates = path(plan, restart, update, model, x, y, y, within, start, names, self.seed)
            parts.append(best_of(_noting_losses(iterates, noted), self.defense.random))
            losses.append(torch.stack(noted, dim=1))
        self.runs[name] = self.score(torch.cat(parts), within, torch.cat(losses))
        return self.runs[name]

    def attack(self, name: str, attack: Attack) -> Run:
        """Run an attack of the registry."""
        self.progress(name)
        parts = [
            attack(self.defense, x, y, self.threat, examples=names, seed=self.seed)
            for x, y, names in self.batches(self.x, self.y, self.examples)
        ]
        self.runs[name] = self.score(torch.cat(parts), self.threat)
        return self.runs[name]

    def strongest(self) -> Estimate:
        """Return the robust accuracy on the examples under the attacks run within the threat model so far.

        The worst attack of each example for a deterministic defense; the worst attack as a whole for a random one, where the
        worst of each example would be luck of the draws.
        """
        within = [run.correct for run in self.runs.values() if run.threat == self.threat]
        worst = min(within, key=lambda correct: float(correct.mean())) if self.defense.random else torch.stack(within).amin(0)
        # What is classified wrong without an attack is not robust either.
        wrong = np.zeros(self.clean.n - len(self))
        return Estimate.of(np.concatenate([worst.numpy(), wrong]))

    def score(self, x_adv: Tensor, threat: ThreatModel, losses: Tensor | None = None) -> Run:
        """Return what images within a threat model left: x_adv (B, C, H, W), and losses (B, steps + 1) to keep with it."""
        if (problem := threat.violation(x_adv, self.x)) is not None:
            raise UserError(f"an attack left the threat model {threat}: {problem}")
        parts = [predictions(self.defense, images, names, self.seed) for images, names in self.batches(x_adv, self.examples)]
        correct = (torch.cat(parts, dim=1) == self.y).double().cpu()
        kept = torch.zeros(len(self), 0) if losses is None else losses
        return Run(correct.mean(0), correct.amin(0), kept.cpu(), threat)


def _loss_of(loss: Loss, y: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, y)


def _noting_losses(iterates: Iterable[tuple[Tensor, Point]], noted: list[Tensor]) -> Iterator[tuple[Tensor, Point]]:
    """Yield the iterates and append the loss (B,) at each to `noted`."""
    for x_adv, point in iterates:
        noted.append(point.loss)
        yield x_adv, point

"""Transfer: adversarial examples of a surrogate, given to the target (Papernot et al., arXiv 1605.07277).

The surrogate that matters for ensembles is the defense's own predictors under the plain mean of logits: it undoes an
aggregation that hides gradients, as in the attack on CrossMax (Zhang et al., arXiv 2411.14834). Unlike the code published with
that paper, every projection here is around the clean image.
"""

from typing import Any

from torch import Tensor, nn

from robench.aggregate import mean_of_logits
from robench.attacks.pgd import best_of, default_step_size, path, pgd, sign_update, untargeted_plan
from robench.attacks.registry import Attack, Found, register
from robench.defense import Defense
from robench.errors import UserError
from robench.noise import Draw
from robench.threat import ThreatModel


class MeanSurrogate(Defense):
    """A defense's own innermost predictors, combined by the mean of their logits: a nested aggregation hides gradients as well."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense
        self.random = defense.random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own innermost predictors' logits: (B, C, H, W) -> (B, M, classes)."""
        return self.defense.innermost(x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the mean of the predictors' logits: (B, N, classes) -> (B, classes)."""
        return mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        """Return the defense's own members."""
        return self.defense.members()


class PredictorSurrogate(MeanSurrogate):
    """One of a defense's own predictors; negative numbers count from the last."""

    def __init__(self, defense: Defense, number: int) -> None:
        super().__init__(defense)
        self.number = number

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own predictors' logits: (B, C, H, W) -> (B, N, classes)."""
        return self.defense.predictors(x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return that predictor's logits: (B, N, classes) -> (B, classes).

        Raises:
            UserError: if there is no such predictor.
        """
        if not -logits.shape[1] <= self.number < logits.shape[1]:
            raise UserError(f"predictor {self.number} does not exist: the defense has {logits.shape[1]}, counted from 0")
        return logits[:, self.number]


def mean_surrogate(defense: Defense) -> Defense:
    """Return the defense with every aggregation in it replaced by the mean of logits; it shares the weights and the noise."""
    return MeanSurrogate(defense)


def transfer(surrogate: Defense, attack: Attack) -> Attack:
    """Return the attack that attacks `surrogate` whatever its target, with the target's images, labels, identities and seed.

    Its parameters are the attack's own and `surrogate`, the kind of the surrogate.
    """

    def attack_surrogate(_defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, **settings: Any) -> Tensor | Found:
        own = {key: value for key, value in settings.items() if key != "surrogate"}
        return attack.function(surrogate, x, y, threat, **own)

    kind = type(surrogate).__name__
    parameters = {**attack.parameters, "surrogate": kind}
    return Attack(f"transfer:{attack.name}", attack.version, parameters, attack_surrogate, random_version=attack.random_version)


@register("mean-transfer", version=1, paper="arXiv 2411.14834", number="steps")
def mean_transfer(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    draws: int = 1,
    finetune: int = 0,
) -> Tensor:
    """PGD on the mean-of-logits surrogate, then `finetune` steps of PGD on the defense itself from where that ended.

    With finetuning, the best of the transferred image and all iterates after it is kept, judged on the defense itself: for a
    random defense by the mean loss over fresh draws, else by whether it is fooled, then by the loss.

    Args beyond those of `pgd`: `finetune`, steps on the defense itself, of the same step size.
    """
    transferred = pgd(
        mean_surrogate(defense),
        x,
        y,
        threat,
        examples=examples,
        seed=seed,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        loss=loss,
        draws=draws,
    )
    if not finetune:
        return transferred
    update = sign_update(threat, default_step_size(threat, steps, step_size))
    # The draws that the surrogate was attacked with would favour the transferred image.
    fresh = -(-restarts * (steps + 1) // (finetune + 1))
    plan = untargeted_plan(loss, finetune, draws)
    iterates = path(plan, fresh, update, defense, x, y, y, threat, transferred, examples, seed)
    return best_of(iterates, defense.random)


@register("predictor-transfer", version=1, paper="arXiv 2408.05446, intermediate layers", number="steps")
def predictor_transfer(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    predictor: int = -1,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    draws: int = 1,
) -> Tensor:
    """PGD on one of the defense's predictors by itself, given to the defense.

    Args beyond those of `pgd`: `predictor`, its number, from 0; negative ones count from the last.

    Raises:
        UserError: if there is no such predictor.
    """
    surrogate = PredictorSurrogate(defense, predictor)
    return pgd(
        surrogate, x, y, threat, examples=examples, seed=seed, steps=steps, step_size=step_size, restarts=restarts, loss=loss, draws=draws
    )

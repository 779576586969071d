"""One step of training: the inner attack on a batch, the loss on what it made, and the optimiser's step."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import folding, noise
from robench.attacks.steps import steepest
from robench.defense import Defense, as_defense
from robench.recipe import InnerAttack, Recipe
from robench.threat import ThreatModel


def train_step(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    draw: noise.Draw,
    *,
    half: bool = False,
    trainable: tuple[str, ...] = (),
) -> Tensor:
    """Take one optimiser step on a batch.

    Args:
        module: what is trained.
        optimiser: of its learning parameters.
        recipe: the loss and the attack.
        x: clean images (B, C, H, W) in [0, 1].
        y: labels (B,).
        draw: identifies the batch's examples and epoch; attack starts and a random defense's noise come from it.
        half: compute in bfloat16 under autocast.
        trainable: dotted paths of the parts that learn, empty for all; the rest stays in evaluation mode.

    Returns:
        the loss, a scalar.
    """
    optimiser.zero_grad(set_to_none=True)
    loss = gradients(module, recipe, x, y, start(recipe, x, draw, half=half), draw, half=half, trainable=trainable)
    optimiser.step()
    return loss


def start(recipe: Recipe, x: Tensor, draw: noise.Draw, *, half: bool = False) -> Tensor:
    """Return where the inner attack on a batch of clean images (B, C, H, W) starts: the images themselves where there is none."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        return x if recipe.attack is None else _start(x, ThreatModel.parse(recipe.attack.threat), recipe.attack, draw)


OF_ATTACKS = 1 << 32
"""Seeds from this one on are of the noise of attacks."""


def gradients(
    module: nn.Module, recipe: Recipe, x: Tensor, y: Tensor, x_start: Tensor, draw: noise.Draw, *, half: bool, trainable: tuple[str, ...]
) -> Tensor:
    """Attack a batch from where the attack starts, add the loss's gradients to the weights', and return the loss, a scalar.

    Args but `x_start` are those of `train_step`. For a deterministic defense nothing here draws or waits for the device.
    """
    defense = as_defense(module)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        images, weights = x, torch.ones(len(x), device=x.device)
        if recipe.attack is not None:
            if recipe.attack.mode == "training":
                _train_mode(module, trainable)
            else:
                module.eval()
            with folding.folded(defense) if folds(recipe, half) else contextlib.nullcontext():
                images = attack_batch(defense, x, y, recipe.attack, draw, x_start)
            if recipe.clean_weight > 0:
                # One forward for both halves: batch norm then learns the statistics of the mixture it is evaluated with.
                images, y = torch.cat([images, x]), torch.cat([y, y])
                weights = torch.cat([weights, recipe.clean_weight * weights])
                draw = noise.Draw(draw.seed, torch.cat([draw.examples, draw.examples]), draw.number)
        _train_mode(module, trainable)
        own_draw = draw if defense.random else None
        if recipe.trades:
            loss = _trades(defense(x, own_draw).float(), defense(images, own_draw).float(), y, recipe.trades)
        else:
            predictors = defense.predictors(images, own_draw)
            loss = (losses(defense, predictors, y, recipe) * weights).sum() / weights.sum()
    loss.backward()
    return loss.detach()


def folds(recipe: Recipe, half: bool) -> bool:
    """Return whether a recipe's inner attack runs with batch norm folded: where float32's last bits are not what is wanted."""
    return half and recipe.attack is not None and recipe.attack.mode == "evaluation"


def losses(defense: Defense, predictors: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """Return each example's loss (B,): of the prediction, or the mean over the predictors (B, N, classes)."""
    if recipe.loss_on == "prediction":
        return functional.cross_entropy(defense.aggregate(predictors.float()), y, reduction="none")
    each = functional.cross_entropy(predictors.float().flatten(0, 1), y.repeat_interleave(predictors.shape[1]), reduction="none")
    return each.reshape(predictors.shape[:2]).mean(1)


def divergence(adversarial: Tensor, clean: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return the Kullback-Leibler divergence of the adversarial from the clean prediction, both logits (B, classes)."""
    return functional.kl_div(adversarial.log_softmax(-1), clean.log_softmax(-1), reduction=reduction, log_target=True)


def _trades(clean: Tensor, adversarial: Tensor, y: Tensor, weight: float) -> Tensor:
    return functional.cross_entropy(clean, y) + weight * divergence(adversarial, clean)


def attack_batch(defense: Defense, x: Tensor, y: Tensor, attack: InnerAttack, draw: noise.Draw, x_start: Tensor | None = None) -> Tensor:
    """Return adversarial images of a training batch (B, C, H, W); the weights take no gradient.

    Args:
        defense: in the mode that the attack asks for.
        x: clean images in [0, 1].
        y: labels.
        attack: its threat model, steps, start and objective.
        draw: identifies the batch's examples and epoch; the start comes from it, and a random defense's noise, each step's another.
        x_start: the start, where it is drawn already.
    """
    threat = ThreatModel.parse(attack.threat)
    raised = _objective(defense, x, y, attack, _apart(draw, 0) if defense.random else None)
    x_adv = _start(x, threat, attack, draw) if x_start is None else x_start
    for step in range(attack.steps):
        point = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(raised(defense(point, _apart(draw, step) if defense.random else None).float()), point)
        # Training needs no exact projection, and scale-and-clip is the common one.
        x_adv = threat.project(point.detach() + attack.step_size * steepest(gradient.float(), threat.norm), x, rounds=0)
    return x_adv.detach()


def _apart(draw: noise.Draw, step: int) -> noise.Draw:
    """Return the draw of an attack's step: not the one that is trained on, nor another step's.

    Images made for the noise that they are trained on teach a defense that noise (as in arXiv 2408.05446's released code, which draws
    anew in the attack and in training).
    """
    return noise.Draw(draw.seed + (step + 1) * OF_ATTACKS, draw.examples, draw.number)


def _objective(defense: Defense, x: Tensor, y: Tensor, attack: InnerAttack, draw: noise.Draw | None) -> Callable[[Tensor], Tensor]:
    """Return what the attack raises, a scalar of the logits."""
    if attack.objective == "cross-entropy":
        return lambda logits: functional.cross_entropy(logits, y, reduction="sum")
    with torch.no_grad():
        clean = defense(x, draw).float()
    return lambda logits: divergence(logits, clean, "sum")


def _start(x: Tensor, threat: ThreatModel, attack: InnerAttack, draw: noise.Draw) -> Tensor:
    shape = tuple(x.shape[1:])
    match attack.start:
        case "uniform":
            return threat.random_start(x, draw.examples, draw.seed, f"training/{draw.number}")
        case "gaussian":
            return threat.project(x + 0.5 * threat.epsilon * noise.normal(draw, "training/gaussian", shape), x, rounds=0)
        case "near":
            return threat.project(x + 0.001 * noise.normal(draw, "training/near", shape), x, rounds=0)
        case _:
            return x


def _train_mode(module: nn.Module, trainable: tuple[str, ...]) -> None:
    module.train(not trainable)
    for name in trainable:
        module.get_submodule(name).train()

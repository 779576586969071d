"""AutoAttack (Croce and Hein, arXiv 2003.01690) by the reference implementation, the package `pyautoattack` 0.2.0.

The one place that touches it. It reseeds torch's global generators for each of its batches, so its results depend on
`batch_size`, which is therefore a parameter of the attack and kept in records. A call here equals a direct call with the same
seed and batches, except that what it does to the process is undone (the generators' states, its log, its warnings, a check that
replaces the interpreter's trace function), and that an image it moves out of the threat model is projected back: its L1
attacks leave the box by rounding, and the budget on images of one value.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal
from unittest import mock

import torch
from torch import Tensor, nn

from robench.attacks.objective import frozen
from robench.attacks.registry import Found, register
from robench.defense import Defense, FreshDraws
from robench.errors import UserError
from robench.noise import Draw
from robench.threat import ThreatModel


@register("pyautoattack", version=1, paper="arXiv 2003.01690")
def pyautoattack(
    defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int, batch_size: int = 100
) -> Found:
    """The standard version: APGD-CE, targeted APGD, targeted FAB and Square, each on what those before it did not fool.

    Towards 9 targets (5 for L1), or all wrong classes where there are fewer. A random defense takes fresh noise at every pass,
    and `Found.counted` is what it prints of one.

    Args beyond every attack's: `batch_size`, images attacked together, on which the result depends.

    Raises:
        UserError: with fewer than 4 classes, if the defense's logits have no gradient, or, for L2 and L1, with images less than
            5 pixels high, on which its Square attack fails.
    """
    return _run("standard", 4, defense, x, y, threat, examples, seed, batch_size)


@register("pyautoattack-rand", version=1, paper="arXiv 2003.01690")
def pyautoattack_rand(
    defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int, batch_size: int = 100
) -> Found:
    """The version for random defenses: APGD-CE and APGD-DLR with gradients averaged over 20 draws.

    It drops an example after one misclassified draw and returns what it did not fool as the clean image, so it overstates the
    robustness of a random defense scored on fresh draws; it is here as the reference that papers report. What it prints itself,
    `Found.counted`, is a count over the worst of several draws and lower.

    Args beyond every attack's: `batch_size`, images attacked together, on which the result depends.

    Raises:
        UserError: with fewer than 3 classes, or if the defense's logits have no gradient.
    """
    return _run("rand", 3, defense, x, y, threat, examples, seed, batch_size)


def _run(
    version: Literal["standard", "rand"],
    least_classes: int,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    examples: Tensor,
    seed: int,
    batch_size: int,
) -> Found:
    if threat.epsilon == 0 or not len(x):
        return Found(x.clone())
    if version == "standard" and threat.norm != "Linf" and x.shape[2] < 5:
        raise UserError(f"AutoAttack in {threat.norm} needs images at least 5 pixels high, and these are {x.shape[2]}")
    with _contained(), frozen(defense):
        from pyautoattack import AutoAttack

        classes = _classes(defense, x[:1], examples[:1], seed)
        if classes < least_classes:
            raise UserError(f"AutoAttack's {version} version needs at least {least_classes} classes, and there are {classes}")
        # A channels-last batch makes its gradient check fail.
        images = x.detach().float().contiguous(memory_format=torch.contiguous_format)
        model = _Float(FreshDraws(defense, seed) if defense.random else defense)
        attack = AutoAttack(model, norm=threat.norm, eps=threat.epsilon, seed=seed, version=version, device=x.device)
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        with _flags() as flags:
            x_adv: Tensor = attack.run_standard_evaluation(images, y, batch_size=batch_size)[0].detach()
        counted = _by_stage(flags, attack.attacks_to_run) if defense.random else {}
    return Found(threat.project(x_adv, images) if threat.violation(x_adv, images) else x_adv, counted=counted)


def _classes(defense: Defense, image: Tensor, example: Tensor, seed: int) -> int:
    """Return the number of classes, having made sure that the logits of one image (1, C, H, W) have a gradient in it."""
    with torch.enable_grad():
        logits = defense(image.detach().clone().requires_grad_(), Draw(seed, example) if defense.random else None)
    if not logits.requires_grad:
        raise UserError("AutoAttack needs a gradient, and this defense's logits have none (a vote?); use mean-transfer-N")
    return int(logits.shape[1])


class _Float(nn.Module):
    """The model with logits in float32, which its attacks take for granted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.float()


@contextlib.contextmanager
def _flags() -> Iterator[dict[str, Tensor]]:
    """Keep the flags (B,) of the examples that it counts as robust after each stage that it runs, ``clean`` before any.

    What it prints is their mean; it returns neither.
    """
    from pyautoattack.state import EvaluationState

    kept: dict[str, Tensor] = {}
    add = EvaluationState.add_run_attack

    def keep(state: EvaluationState, stage: str) -> None:
        kept[stage] = state.robust_flags.clone()
        add(state, stage)

    def initial(state: EvaluationState, _accuracy: float) -> None:
        kept["clean"] = state.robust_flags.clone()

    with (
        mock.patch.object(EvaluationState, "add_run_attack", keep),
        mock.patch.object(EvaluationState, "clean_accuracy", property(lambda _state: 0.0, initial)),
    ):
        yield kept


def _by_stage(flags: Mapping[str, Tensor], stages: Iterable[str]) -> dict[str, Tensor]:
    """Return the flags of all stages: one that found nothing left to attack leaves those before it."""
    last, counted = flags["clean"], {"clean": flags["clean"]}
    for stage in stages:
        last = counted[stage] = flags.get(stage, last)
    return counted


def _without_tracing(model: nn.Module, x: Tensor, *_rest: object, **_options: object) -> None:
    """Take the pass that `check_dynamic` takes, so that a random defense's draws keep their order, and no more.

    The original sets the interpreter's trace function, which ends coverage and debuggers, and counts calls in a global that is
    never reset.
    """
    with torch.no_grad():
        model(x)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Undo what pyautoattack does to the process; it takes random numbers from torch only."""
    logger = logging.getLogger("auto-attack")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            warnings.simplefilter("ignore")
            from pyautoattack import checks

            with mock.patch.object(checks, "check_dynamic", _without_tracing):
                yield
    finally:
        logger.disabled = disabled

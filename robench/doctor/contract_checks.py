"""The doctor's checks before any attack: whether a defense is what it declares itself to be."""

import torch
from torch import Tensor

from robench import contract
from robench.data import Dataset, as_float
from robench.defense import Defense, Plain
from robench.doctor.finding import CARLINI, Finding
from robench.errors import UserError
from robench.noise import Draw, isolated_generator
from robench.targets import Target


def admit(target: Target, dataset: Dataset, *, seed: int, device: str) -> tuple[Defense, list[Finding]]:
    """Return the defense in evaluation mode, ready for attacks, and what it declares wrongly.

    One that is random and does not say so comes back as a random defense without structure, so that attacks average its draws.

    Raises:
        UserError: if the model fails on the data set's images or answers otherwise where they take a gradient, its logits do not fit or
            are not finite, or there is one class.
    """
    if len(dataset.classes) < 2:
        raise UserError(f"the doctor needs at least 2 classes, and {dataset.name} has {len(dataset.classes)}")
    defense = target.defense.to(device).eval()
    x = as_float(dataset.images[: contract.TRIED]).to(device)
    draw = Draw(seed, torch.arange(len(x), device=device)) if defense.random else None
    with isolated_generator(seed, device):
        logits, again = (contract.logits(target, x, draw, dataset) for _ in range(2))
    contract.check_gradients(target, x, draw)
    differs = float((logits != again).any(1).double().mean())
    by_batch = float((contract.moved_by_others(target, x, draw, dataset) > contract.MOVED).double().mean())
    declared = "random" if defense.random else "deterministic"
    findings = [
        Finding(
            "declaration", {"differ": differs}, differs > 0,
            f"share of images whose logits differ between two forwards, for a defense declared {declared}"
            + (", on the same draw" if defense.random else ""), CARLINI,
        ),
        _mode(defense, by_batch),
        _probabilities(logits),
    ]  # fmt: skip
    return (Plain(defense, random=True).eval() if differs and not defense.random else defense), findings


def _mode(defense: Defense, by_batch: float) -> Finding:
    training = sum(module.training for module in defense.modules())
    values = {"modules in training mode": float(training), "depend on the batch": by_batch}
    meaning = "modules that stay in training mode after eval(), and share of images whose logits depend on the others in the batch"
    return Finding("evaluation mode", values, max(values.values()) > 0, meaning, CARLINI)


def _probabilities(logits: Tensor) -> Finding:
    sums_to_one = ((logits >= 0).all(1) & (logits <= 1).all(1) & ((logits.sum(1) - 1).abs() < 1e-4)).double()
    values = {"rows that are probabilities": float(sums_to_one.mean())}
    meaning = "share of outputs in [0, 1] that sum to 1: the softmax of probabilities is flat; return log-probabilities"
    return Finding("probabilities", values, values["rows that are probabilities"] == 1, meaning, CARLINI, decisive=False)

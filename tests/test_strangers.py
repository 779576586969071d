"""What fails in a model or an attack of someone else's is one line that says where."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, data, doctor, zoo
from robench.attacks import Attack, parse
from robench.defense import Plain
from robench.errors import UserError
from robench.evaluation import measure
from robench.targets import of_module
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:48/255")
DIGITS = data.load("digits", "test").first(20)


def idle(_defense: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


class Model(nn.Module):
    """The embedded digits' mean images as templates, with something done to the answer, from some forward on."""

    def __init__(self, change: Callable[[Tensor], Any], after: int = 0) -> None:
        super().__init__()
        train = data.load("digits", "train")
        images = data.as_float(train.images).flatten(1)
        self.templates = torch.stack([images[train.labels == c].mean(0) for c in range(10)])
        self.change, self.left = change, after

    def forward(self, x: Tensor) -> Any:
        logits = 10 * (x.flatten(1) @ self.templates.T - self.templates.square().sum(1) / 2)
        self.left -= 1
        return self.change(logits) if self.left < 0 else logits


def leaves(_logits: Tensor) -> Tensor:
    raise SystemExit(0)


def fails(_logits: Tensor) -> Tensor:
    raise RuntimeError("late\nboom")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: (logits, logits), "its forward returns an object of type tuple, where a tensor"),
        (lambda logits: logits.detach().numpy(), "its forward returns an object of type ndarray"),
        (lambda logits: logits.long(), "returns logits of type torch.int64; it has to return a tensor"),
        (leaves, "SystemExit: 0"),
        (fails, "RuntimeError: late"),
    ],
)
def test_an_answer_that_is_none_is_named_before_any_attack(change: Callable[[Tensor], Any], message: str) -> None:
    for call in (lambda: measure(of_module(Model(change), "model"), DIGITS, LINF, Attack("idle", 1, {}, idle)),
                 lambda: doctor.examine(of_module(Model(change), "model"), DIGITS, LINF)):  # fmt: skip
        with pytest.raises(UserError, match=rf"^model [^\n]*{message}[^\n]*$"):
            call()


@pytest.mark.parametrize("change", [leaves, fails])
def test_a_failure_during_the_attack_says_where(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UserError, match=r"^model under idle fails: [^\n]+ \(test_strangers.py, line \d+\)$"):
        measure(of_module(Model(change, 17), "model"), DIGITS, LINF, Attack("idle", 1, {}, idle))
    with pytest.raises(UserError, match=r"^model before the doctor fails: [^\n]+ \(test_strangers.py, line \d+\)$"):
        doctor.examine(of_module(Model(change, 60), "model"), DIGITS, LINF)


def test_an_attack_that_fails_or_takes_other_arguments_is_named() -> None:
    def divides(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(1 // 0)

    with pytest.raises(UserError, match=r"^model under mine fails: ZeroDivisionError[^\n]* \(test_strangers.py, line \d+\)$"):
        measure(of_module(Model(lambda logits: logits), "model"), DIGITS, LINF, Attack("mine", 1, {}, divides))


def test_what_fails_in_robench_alone_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        measure(of_module(Model(lambda logits: logits), "model"), DIGITS, LINF, replace(parse("fgsm"), parameters={"nonsense": 1}))


# What registers


@pytest.mark.parametrize(
    ("version", "function", "message"),
    [
        ("one", lambda defense, x, y, threat, *, examples, seed: x, r"^attack 'odd': its version is 'one'; a version is a whole number"),
        (1, lambda defense, x, y: x, r"^attack 'odd' cannot be called as \(defense, x, y, threat, \*, examples, seed, tries\): too many"),
        (1, lambda defense, x, y, threat, *, examples, seed: x, "got an unexpected keyword argument 'tries'"),
        (1, lambda defense, x, y, threat, *, examples, seed, tries, size: x, "missing a required argument: 'size'"),
    ],
)
def test_an_attack_that_could_not_be_run_is_not_registered(version: Any, function: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attacks.register("odd", version=version, paper="", number="tries")(function)
    assert "odd" not in attacks.registered()


@pytest.mark.parametrize(
    ("paper", "factory", "message"),
    [
        (None, lambda setting: None, r"its paper is of type NoneType and not a robench.zoo.Paper$"),
        (zoo.entries()["natural"].paper, lambda: None, r"cannot be called as \(setting\): too many positional arguments"),
        (zoo.entries()["natural"].paper, lambda setting, *, k: None, r"missing a required argument: 'k'"),
    ],
)
def test_a_defense_that_could_not_be_built_is_not_registered(paper: Any, factory: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        zoo.register(paper=paper, version=1)(factory)
    assert "<lambda>" not in zoo.entries()


def test_a_specimen_is_of_a_defense_and_stages() -> None:
    with pytest.raises(UserError, match=r"defense is of type Linear and no Defense; robench.defense.Plain wraps a module$"):
        zoo.Specimen(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"stages are no tuple of robench.recipe.Stage$"):
        zoo.Specimen(Plain(nn.Linear(2, 2)), stages=["train"])  # type: ignore[arg-type]

"""Recipes: schedules, what is written of them, the loss and attack they ask for, epochs by name, and a budget turned into epochs."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import data, noise, training_budget, zoo
from robench.adversarial import attack_batch, divergence, train_step
from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.errors import UserError
from robench.fingerprint import state_hash
from robench.noise import Draw
from robench.recipe import InnerAttack, Recipe, Stage, learning_rate, plain, summary, with_epochs
from robench.threat import ThreatModel
from robench.zoo import Setting, Specimen

SETTING = Setting("digits", 10, (3, 16, 16), "smoke", 0)
ATTACK = InnerAttack("Linf:0.1", steps=2, step_size=0.05, start="uniform")
PLAIN = Recipe(epochs=2, learning_rate=2.0)


def network() -> Ensemble:
    with noise.isolated_generator(0):
        made = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    return Ensemble([made], mean_of_logits)


def batch(count: int = 32) -> tuple[Tensor, Tensor, Draw]:
    digits = data.load("digits", "train").first(count)
    return data.as_float(digits.images), digits.labels, Draw(0, torch.arange(count))


# What is written of a recipe


def test_what_recipes_could_not_say_before_is_left_out_where_it_says_the_same() -> None:
    """Otherwise all weights that were ever kept would be trained anew."""
    old = plain(dataclasses.replace(PLAIN, attack=ATTACK))
    assert not {"trades", "averaging"} & set(old)
    assert set(old["attack"]) == {"threat", "steps", "step_size", "start"}
    new = plain(dataclasses.replace(PLAIN, attack=dataclasses.replace(ATTACK, mode="training"), averaging=0.9))
    assert (new["averaging"], new["attack"]["mode"]) == (0.9, "training")


def test_the_summary_says_what_was_trained() -> None:
    recipe = Recipe(3, 0.1, attack=dataclasses.replace(ATTACK, objective="divergence"), trades=6.0, averaging=0.99)
    line = summary([Stage(recipe, 0, "networks.0")], ["float32"])["stage 1"]
    assert line == (
        "networks.0/all: 3 epochs, sgd 0.1 one-cycle, batch 128, threat=Linf:0.1 steps=2 step_size=0.05 start=uniform "
        "objective=divergence, clean weight 0.0, float32, trades 6.0, averaging 0.99"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trades": 6.0}, "needs an attack"),
        ({"trades": 6.0, "attack": ATTACK, "clean_weight": 1.0}, "clean_weight 0"),
        ({"averaging": 1.0}, "at least 0 and below 1"),
        ({"averaging": -0.1}, "at least 0 and below 1"),
        ({"epochs": 0}, "^a recipe's epochs is 0; it has to be a finite number of at least 1$"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"trades": -1.0, "attack": ATTACK}, "trades is -1.0; it has to be a finite number of at least 0"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_an_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **wrong)


def test_an_inner_attack_out_of_range_is_an_error() -> None:
    with pytest.raises(UserError, match="budget must be at least 0"):
        dataclasses.replace(ATTACK, threat="L2:-1")
    with pytest.raises(UserError, match="an inner attack's steps is -1"):
        dataclasses.replace(ATTACK, steps=-1)


# Schedules


def rates(schedule: Any, steps: int) -> list[float]:
    return [learning_rate(dataclasses.replace(PLAIN, schedule=schedule), step, steps) for step in range(steps)]


def test_the_learning_rate_follows_its_schedule() -> None:
    assert rates("constant", 4) == [2.0] * 4
    assert rates("step", 6) == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.02, 0.02])
    assert rates("late-step", 20) == pytest.approx([2.0] * 15 + [0.2] * 3 + [0.02] * 2)
    assert rates("early-step", 50) == pytest.approx([2.0] * 3 + [0.4] * 3 + [0.08] * 3 + [0.016] * 41)
    assert rates("cosine", 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    cycle = rates("one-cycle", 1000)
    assert cycle[0] == pytest.approx(2 / 300)
    assert cycle[149] == pytest.approx(1.0)
    assert cycle[299] == pytest.approx(2.0)
    assert cycle[649] == pytest.approx(1.0, abs=0.005)
    assert 0 < cycle[-1] < 0.01
    assert max(cycle) < 2.002
    assert cycle[:300] == sorted(cycle[:300])
    assert cycle[301:] == sorted(cycle[301:], reverse=True)


# The loss and the attack


def test_the_loss_of_trades_is_clean_cross_entropy_and_divergence() -> None:
    """KL(clean || adversarial) summed over classes and averaged over the batch, each half by its own batch statistics."""
    x, y, draw = batch()
    attack = dataclasses.replace(ATTACK, start="near", objective="divergence")
    x_adv = attack_batch(network().eval(), x, y, attack, draw)
    clean, adversarial = network().train()(x), network().train()(x_adv)
    p = clean.softmax(1)
    expected = functional.cross_entropy(clean, y) + 6 * (p * (p.log() - adversarial.softmax(1).log())).sum(1).mean()
    module = network()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.0)
    loss = train_step(module, optimiser, Recipe(1, 0.1, attack=attack, trades=6.0), x, y, draw)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_divergence_attack_raises_the_divergence_within_its_budget() -> None:
    x, y, draw = batch()
    defense = network().eval()
    x_adv = attack_batch(defense, x, y, InnerAttack("Linf:0.1", 5, 0.03, "near", objective="divergence"), draw)
    assert ThreatModel.parse("Linf:0.1").violation(x_adv, x) is None
    near = attack_batch(defense, x, y, InnerAttack("Linf:0.1", 0, 0.03, "near"), draw)
    assert 0.0005 < float((near - x).abs().mean()) < 0.001
    with torch.no_grad():
        clean = defense(x)
        before, after = (divergence(defense(images), clean) for images in (near, x_adv))
    assert float(after) > 10 * float(before)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_the_attack_s_mode_decides_what_the_batch_norm_sees(mode: Any) -> None:
    """Three steps and the update are four forwards in training mode, and one where the attack is in evaluation mode."""
    x, y, draw = batch()
    module = network()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.0)
    train_step(module, optimiser, Recipe(1, 0.1, attack=InnerAttack("Linf:0.1", 3, 0.05, "uniform", mode=mode)), x, y, draw)
    assert int(module.get_buffer("networks.0.1.num_batches_tracked")) == (4 if mode == "training" else 1)


# Epochs by name


def test_every_trained_defense_can_be_asked_for_its_epochs() -> None:
    named = zoo.parse("natural, epochs=9")
    assert named.text == "natural,epochs=9"
    assert zoo.parse(named.text) == named
    usual, longer = zoo.parse("natural").build(SETTING), named.build(SETTING)
    assert [stage.recipe.epochs for stage in longer.stages] == [9]
    assert dataclasses.replace(longer.stages[0].recipe, epochs=usual.stages[0].recipe.epochs) == usual.stages[0].recipe


def test_later_stages_train_in_proportion_and_one_epoch_at_least() -> None:
    stages = [Stage(dataclasses.replace(PLAIN, epochs=epochs), 0) for epochs in (6, 3, 1)]
    assert [stage.recipe.epochs for stage in with_epochs(stages, 12)] == [12, 6, 2]
    assert [stage.recipe.epochs for stage in with_epochs(stages, 1)] == [1, 1, 1]
    assert with_epochs((), 3) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("natural,epochs=0", r"^defense 'natural': epochs=0 trains nothing; write 1 or more$"),
        ("natural,epochs=-2", r"trains nothing"),
        ("natural,epochs=many", r"^defense 'natural': epochs='many' is not of type int$"),
    ],
)
def test_epochs_that_make_no_sense_are_an_error_of_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        zoo.parse(name)


# Budgets


def specimen(*epochs: int) -> Specimen:
    return Specimen(network(), tuple(Stage(dataclasses.replace(PLAIN, epochs=count, batch_size=8), 0) for count in epochs))


@pytest.mark.parametrize(("seconds", "epochs"), [(100, 4), (130, 6), (26, 1)])
def test_a_budget_becomes_the_most_epochs_that_fit(seconds: float, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten seconds an epoch of both stages, 6 and 6 epochs; 5 % of the budget are for the rest."""
    monkeypatch.setattr(training_budget, "_seconds_per_epoch", lambda *_: 10.0)
    digits = data.load("digits", "train").first(64)
    assert training_budget.fitting_epochs(specimen(6, 6), digits, seconds, "cpu") == epochs


def test_a_budget_too_small_for_one_epoch_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_budget, "_seconds_per_epoch", lambda *_: 10.0)
    digits = data.load("digits", "train").first(64)
    with pytest.raises(UserError, match=r"^a budget of 5 s does not fit one epoch, which takes about 11 s here$"):
        training_budget.fitting_epochs(specimen(6), digits, 5.0, "cpu")
    with pytest.raises(UserError, match=r"^the defense is not trained, so there is nothing to fit into a budget$"):
        training_budget.fitting_epochs(Specimen(network()), digits, 5.0, "cpu")


def test_timing_leaves_the_defense_as_it_is() -> None:
    made, digits = specimen(2), data.load("digits", "train").first(64)
    before = state_hash(made.defense)
    assert training_budget.fitting_epochs(made, digits, 3600.0, "cpu") > 10
    assert state_hash(made.defense) == before

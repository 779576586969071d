"""What holds for every attack: these tests run over the registry, so registering an attack enrols it."""

import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench import attacks, losses, plugins
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.attacks import registry
from robench.attacks.ascent import checkpoints
from robench.attacks.objective import mean_logits
from robench.attacks.transfer import MeanSurrogate
from robench.cost import counted
from robench.defense import Defense, Ensemble, as_defense
from robench.errors import UserError
from robench.noise import Draw, normal, uniform
from robench.threat import ThreatModel

CLASSES = 5
QUICK = {"steps": 8, "queries": 40, "draws": 2}
"""Enough to exercise an attack; set where it has the parameter."""
ADAPTED = {name for name, attack in attacks.registered().items() if attack.function.__module__ == "robench.attacks.pyautoattack"}
"""These take their lengths from the reference implementation, and depend on the batch by its design."""
FITTED = {name for name, attack in attacks.registered().items() if attack.apply}
"""These learn from training images first; `test_universal.py`."""
OWN = sorted(set(attacks.registered()) - ADAPTED - FITTED)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pyautoattack", "pyautoattack-rand")]
RANDOM_STARTS = ["apgd-ce", "apgd-dlr", "apgd-t", "mean-transfer", "momentum", "pgd", "pgd-adam", "predictor-transfer", "square"]

every_attack = pytest.mark.parametrize("name", [*OWN, *SLOW])
own_attacks = pytest.mark.parametrize("name", OWN)


class Network(nn.Module):
    """Two layers with fixed weights from the counter-based generator."""

    def __init__(self, size: int, number: int) -> None:
        super().__init__()
        draw = Draw(7, torch.tensor([0]), number)
        self.first = nn.Parameter(2 * normal(draw, "first", (size, 16))[0] / size**0.5)
        self.second = nn.Parameter(normal(draw, "second", (16, CLASSES))[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x - 0.5).flatten(1) @ self.first) @ self.second


class Noisy(Defense):
    """Two networks that see the image with Gaussian noise."""

    random = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList([Network(size, 0), Network(size, 1)])

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        noise = normal(draw, "noise", tuple(x.shape[1:]))
        return torch.stack([network(x + 0.3 * noise) for network in self.networks], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        return list(self.networks)


def images(*shape: int, first: int = 0) -> Tensor:
    """Return images (B, C, H, W) of which about a third of the values lie on the edge of the box."""
    return (1.5 * uniform(Draw(1, torch.arange(first, first + shape[0])), "images", shape[1:]) - 0.25).clamp(0, 1)


def ensemble(size: int) -> Ensemble:
    return Ensemble([Network(size, 0), Network(size, 1)], mean_of_logits).eval()


def quick(name: str) -> attacks.Attack:
    attack = attacks.registered()[name]
    settings = [f"{key}={value}" for key, value in QUICK.items() if key in attack.defaults() and key != attack.number]
    return attacks.parse(",".join([f"{name}-8" if attack.number else name, *settings]))


def predicted(defense: Defense, x: Tensor) -> Tensor:
    with torch.no_grad():
        return defense(x).argmax(1)


def stays_inside(name: str, threat: ThreatModel, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    defense = ensemble(x[0].numel())
    y = predicted(defense, x)
    if len(x) > 1:
        y[0] = (y[0] + 1) % CLASSES
    x_adv = quick(name)(defense, x, y, threat, examples=torch.arange(len(x)) + 2**40, seed=0)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert threat.violation(x_adv, x) is None
    if threat.epsilon == 0:
        assert torch.equal(x_adv, x)


@own_attacks
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("budget", ["0", "1e-6", "8/255", "2", "1000"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 1, 5, 2), (2, 1, 1, 1)])
def test_stays_inside_the_threat_model(name: str, norm: str, budget: str, shape: tuple[int, ...]) -> None:
    stays_inside(name, ThreatModel.parse(f"{norm}:{budget}"), shape)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("text", ["Linf:0", "Linf:2", "L2:8/255", "L1:1e-6", "L1:1000"])
def test_the_reference_stays_inside_the_threat_model(name: str, text: str) -> None:
    """Its own L1 projection leaves the box by rounding; the adapter projects."""
    stays_inside(name, ThreatModel.parse(text), (3, 1, 5, 2))


@pytest.mark.parametrize(("name", "text"), [
    *[(name, text) for name in OWN for text in ("Linf:0.1", "L2:0.5", "L1:2")],
    *[pytest.param(name, "Linf:0.1", marks=pytest.mark.slow) for name in ("pyautoattack", "pyautoattack-rand")],
])  # fmt: skip
def test_same_seed_same_result_whatever_the_global_generators(name: str, text: str) -> None:
    x, threat = images(4, 3, 4, 3), ThreatModel.parse(text)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index] # noqa: NPY002
        defense = ensemble(36)
        results.append(quick(name)(defense, x, predicted(defense, x), threat, examples=torch.arange(4), seed=5))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index] # noqa: NPY002
        assert random.getstate() == before[2]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", RANDOM_STARTS)
def test_another_seed_starts_elsewhere(name: str) -> None:
    defense, x, threat = ensemble(48), images(4, 3, 4, 4), ThreatModel.parse("L2:0.05")
    one, two = (quick(name)(defense, x, predicted(defense, x), threat, examples=torch.arange(4), seed=seed) for seed in (0, 1))
    assert not torch.equal(one, two)


@own_attacks
@pytest.mark.parametrize("kind", [ensemble, Noisy])
@pytest.mark.parametrize("text", ["Linf:0.05", "L2:0.3", "L1:1"])
def test_does_not_depend_on_the_batch_or_its_order(name: str, kind: type[Defense], text: str) -> None:
    defense, x, threat, attack = kind(48).eval(), images(7, 3, 4, 4), ThreatModel.parse(text), quick(name)
    examples = torch.tensor([5, 11, 2, 40, 7, 300, 1])
    y = mean_logits(defense, x, examples=examples, seed=0, numbers=range(4)).argmax(1)
    y[3] = (y[3] + 1) % CLASSES
    whole = attack(defense, x, y, threat, examples=examples, seed=3)
    some = [0, 3, 5]
    alone = [attack(defense, x[i : i + 1], y[i : i + 1], threat, examples=examples[i : i + 1], seed=3) for i in some]
    torch.testing.assert_close(torch.cat(alone), whole[some], rtol=0, atol=1e-5)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = attack(defense, x[order], y[order], threat, examples=examples[order], seed=3)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)


@every_attack
@pytest.mark.parametrize("kind", [ensemble, Noisy])
def test_leaves_the_defense_as_it_was(name: str, kind: type[Defense]) -> None:
    defense, x = kind(48).eval(), images(2, 3, 4, 4)
    parameters = list(defense.parameters())
    parameters[0].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in parameters]
    threat = ThreatModel.parse("Linf:0.02")
    x_adv = quick(name)(defense, x, torch.tensor([0, 1]), threat, examples=torch.arange(2), seed=0)
    assert threat.violation(x_adv, x) is None
    assert [parameter.requires_grad for parameter in parameters] == [False, *[True] * (len(parameters) - 1)]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert not defense.training


@own_attacks
def test_raises_the_loss_of_a_random_defense(name: str) -> None:
    """On draws that the attack did not see, and more than noise of the budget's size would."""
    defense, x, threat = Noisy(48).eval(), images(6, 3, 4, 4), ThreatModel.parse("Linf:0.1")
    examples, unseen = torch.arange(6), range(10**6, 10**6 + 30)

    def margin(at: Tensor) -> Tensor:
        return losses.margin(mean_logits(defense, at, examples=examples, seed=0, numbers=unseen), y)

    y = mean_logits(defense, x, examples=examples, seed=0, numbers=unseen).argmax(1)
    x_adv = quick(name)(defense, x, y, threat, examples=examples, seed=0)
    by_noise = margin(threat.random_start(x, examples, seed=0)) - margin(x)
    assert ((margin(x_adv) - margin(x)) > by_noise.abs().max()).all()


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd_stops_at_the_first_success_and_packs_the_survivors(name: str) -> None:
    """The passes are those of each example alone, and an image misclassified as it is stays as it is."""
    defense, x, threat, attack = ensemble(48), images(6, 3, 4, 4), ThreatModel.parse("Linf:0.04"), attacks.parse(name)
    y, examples = predicted(defense, x), torch.arange(6)
    y[2] = (y[2] + 1) % CLASSES
    with counted(defense) as whole:
        x_adv = attack(defense, x, y, threat, examples=examples, seed=0)
    assert torch.equal(x_adv[2], x[2])
    fooled = predicted(defense, x_adv) != y
    alone = []
    for i in range(6):
        with counted(defense) as cost:
            attack(defense, x[i : i + 1], y[i : i + 1], threat, examples=examples[i : i + 1], seed=0)
        alone.append(cost)
    members, runs = 2, 4 if name == "apgd-t" else 1
    full = members * (1 + 102 * runs)
    assert (whole.forwards, whole.backwards) == (sum(c.forwards for c in alone), sum(c.backwards for c in alone))
    assert alone[2].forwards == members
    assert [cost.forwards == full for cost in alone] == (~fooled).tolist()
    assert fooled.sum() not in (0, 6)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd_attacks_every_example_of_a_random_defense_to_the_end(name: str) -> None:
    defense, x = Noisy(48).eval(), images(3, 3, 4, 4)
    attack, wrong = attacks.parse(f"{name},steps=10,draws=3"), torch.tensor([4, 4, 4])
    with counted(defense) as cost:
        attack(defense, x, wrong, ThreatModel.parse("Linf:0.3"), examples=torch.arange(3), seed=0)
    runs = 4 if name == "apgd-t" else 1
    assert cost.forwards == 3 * 2 * 3 * (1 + 12 * runs)
    assert cost.backwards == 3 * 2 * 3 * 10 * runs


def test_apgd_checkpoints_are_the_papers() -> None:
    assert checkpoints("Linf", 100) == {0: 0, 22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert checkpoints("L2", 20) == {0: 0, 5: 5, 9: 4, 12: 3, 14: 2, 16: 2, 18: 2, 19: 1}
    assert checkpoints("L1", 100) == dict.fromkeys(range(4, 100, 4), 4)
    assert checkpoints("Linf", 1) == {0: 0}


def test_targeted_apgd_needs_four_classes_and_dlr_three() -> None:
    class Narrow(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, : self.classes]

    x, threat, examples = images(2, 1, 2, 2), ThreatModel.parse("Linf:0.1"), torch.arange(2)
    for name, least in [("apgd-ce", 2), ("apgd-dlr", 3), ("apgd-t", 4), ("pyautoattack", 4), ("pyautoattack-rand", 3)]:
        defense = as_defense(Narrow(least - 1)).eval()
        if least > 2:
            with pytest.raises(UserError, match=f"at least {least} classes"):
                attacks.parse(name)(defense, x, predicted(defense, x), threat, examples=examples, seed=0)
        defense = as_defense(Narrow(least)).eval()
        if name in OWN:
            quick(name)(defense, x, predicted(defense, x), threat, examples=examples, seed=0)


def test_transfer_ignores_the_target_and_records_the_surrogate() -> None:
    surrogate, target = ensemble(48), Ensemble([Network(48, 5)], mean_of_logits).eval()
    x, threat, plain = images(3, 3, 4, 4), ThreatModel.parse("L2:0.4"), attacks.parse("pgd-8")
    moved = attacks.transfer(surrogate, plain)
    y = predicted(target, x)
    through = moved(target, x, y, threat, examples=torch.arange(3), seed=0)
    assert torch.equal(through, plain(surrogate, x, y, threat, examples=torch.arange(3), seed=0))
    assert not torch.equal(through, plain(target, x, y, threat, examples=torch.arange(3), seed=0))
    assert moved.parameters == {**plain.parameters, "surrogate": "Ensemble"}
    assert moved.name == "transfer:pgd-8"


def test_mean_surrogate_keeps_predictors_and_noise() -> None:
    noisy, x = Noisy(48), images(3, 3, 4, 4)
    draw = Draw(0, torch.arange(3), 4)
    surrogate = attacks.mean_surrogate(Ensemble([noisy, Network(48, 2), Network(48, 3)], crossmax))
    assert isinstance(surrogate, MeanSurrogate)
    assert surrogate.random
    torch.testing.assert_close(surrogate(x, draw), surrogate.defense.innermost(x, draw).mean(1))
    assert surrogate.members() == surrogate.defense.members()


def test_mean_transfer_goes_through_every_aggregation_of_a_nested_ensemble() -> None:
    """The mean of two votes has no gradient; the mean of the six networks behind them has one."""
    votes = [Ensemble([Network(48, 3 * vote + number) for number in range(3)], majority_vote) for vote in range(2)]
    nested = Ensemble(votes, mean_of_logits).eval()
    x, threat = images(12, 3, 4, 4), ThreatModel.parse("Linf:0.3")
    y = predicted(nested, x)
    shown = attacks.mean_surrogate(nested).predictors(x)
    assert shown.shape == (12, 6, nested(x).shape[1])
    torch.testing.assert_close(shown[:, 4], votes[1].networks[1](x))
    moved = attacks.parse("mean-transfer-20")(nested, x, y, threat, examples=torch.arange(12), seed=0)
    assert (predicted(nested, moved) != y).float().mean() > 0.9


def test_momentum_on_the_mean_surrogate_is_momentum_on_that() -> None:
    votes = Ensemble([Network(48, number) for number in range(3)], crossmax).eval()
    x, threat = images(6, 3, 4, 4), ThreatModel.parse("L2:1")
    y, settings = predicted(votes, x), {"examples": torch.arange(6), "seed": 0}
    moved = attacks.parse("momentum-8,surrogate=mean")(votes, x, y, threat, **settings)
    assert torch.equal(moved, attacks.parse("momentum-8")(attacks.mean_surrogate(votes), x, y, threat, **settings))
    assert not torch.equal(moved, attacks.parse("momentum-8")(votes, x, y, threat, **settings))
    with pytest.raises(UserError, match="surrogate 'median' is not one of none, mean"):
        attacks.parse("momentum-8,surrogate=median")(votes, x, y, threat, **settings)


def test_predictor_transfer_is_pgd_on_that_predictor() -> None:
    networks = [Network(48, number) for number in range(3)]
    defense, x, threat = Ensemble(networks, crossmax).eval(), images(4, 3, 4, 4), ThreatModel.parse("Linf:0.1")
    y, settings = predicted(defense, x), {"examples": torch.arange(4), "seed": 0}
    for number, predictor in ((1, 1), (2, -1)):
        moved = attacks.parse(f"predictor-transfer-5,predictor={predictor}")(defense, x, y, threat, **settings)
        alone = Ensemble([networks[number]], mean_of_logits).eval()
        assert torch.equal(moved, attacks.parse("pgd-5")(alone, x, y, threat, **settings))
    with pytest.raises(UserError, match="predictor 3 does not exist: the defense has 3"):
        attacks.parse("predictor-transfer-5,predictor=3")(defense, x, y, threat, **settings)


def test_mean_transfer_fools_a_vote_that_has_no_gradient() -> None:
    voters = Ensemble([Network(48, number) for number in range(3)], majority_vote).eval()
    x, threat = images(12, 3, 4, 4), ThreatModel.parse("Linf:0.3")
    y, examples = predicted(voters, x), torch.arange(12)
    direct, moved = (attacks.parse(name)(voters, x, y, threat, examples=examples, seed=0) for name in ("fgsm", "mean-transfer-20"))
    assert torch.equal(direct, x)
    assert (predicted(voters, moved) != y).float().mean() > 0.9
    assert threat.violation(moved, x) is None
    with pytest.raises(UserError, match="needs a gradient"):
        attacks.parse("pyautoattack")(voters, x, y, threat, examples=examples, seed=0)


@pytest.mark.parametrize("kind", [ensemble, Noisy])
def test_finetuning_never_loses_to_the_transferred_image(kind: type[Defense]) -> None:
    """And it stays inside the budget of the clean image, which a chain of projections around adversarial images would leave."""
    defense, x, threat = kind(48).eval(), images(6, 3, 4, 4), ThreatModel.parse("Linf:0.02")
    examples = torch.arange(6)
    y = mean_logits(defense, x, examples=examples, seed=0, numbers=range(20)).argmax(1)
    both = [attacks.parse(f"mean-transfer-1,draws=20,step_size=0.005,finetune={steps}") for steps in (0, 20)]
    plain, tuned = (attack(defense, x, y, threat, examples=examples, seed=0) for attack in both)
    logits = [mean_logits(defense, at, examples=examples, seed=1, numbers=range(50)) for at in (plain, tuned)]
    assert (losses.cross_entropy(logits[1], y) > losses.cross_entropy(logits[0], y)).all()
    assert threat.violation(tuned, x) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("apgd-cc", "unknown attack 'apgd-cc'.*did you mean 'apgd-ce'"),
        ("pgd", "'pgd' should read 'pgd-N' with N a positive whole number"),
        ("pgd-0", "'pgd-0' should read 'pgd-N'"),
        ("fgsm-3", "'fgsm-3' should read 'fgsm'"),
        ("pgd-20,restart=2", "no parameter 'restart'.*did you mean 'restarts'"),
        ("pgd-20,restarts=two", "restarts='two' is not of type int"),
        ("pgd-20,restarts=0", "restarts must be at least 1, not 0"),
        ("apgd-t,targets", "targets needs a value, as in targets=9"),
        ("apgd-t,targets=", "targets='' is not of type int"),
        ("pgd-20,steps=3", "no parameter 'steps'"),
        ("pgd-20,restarts=2,restarts=3", "is given 'restarts' twice"),
        ("apgd-ce,rho=high", "rho='high' is not of type float"),
    ],
)
def test_parse_names_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        attacks.parse(text)


def test_parse_reads_numbers_fractions_and_defaults() -> None:
    attack = attacks.parse("pgd-20,step_size=2/255,loss=margin")
    assert attack.name == "pgd-20"
    assert attack.parameters == {"steps": 20, "step_size": float(Fraction(2, 255)), "restarts": 1, "loss": "margin", "draws": 1}
    assert attacks.parse("apgd-t").parameters == {"steps": 100, "restarts": 1, "draws": 1, "rho": 0.75, "targets": 9}
    assert attacks.parse("mean-transfer-5").parameters["finetune"] == 0


def test_an_attack_may_have_a_version_of_its_own_on_random_defenses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))

    @attacks.register("still", version=2, paper="none", number="steps", random_version=5)
    def still(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int, steps: int) -> Tensor:
        return x.clone()

    assert [attacks.parse("still-3").version_on(random) for random in (False, True)] == [2, 5]
    assert [attacks.current_version("still-3", random) for random in (False, True)] == [2, 5]
    assert [attacks.current_version("pgd-20", random) for random in (False, True)] == [attacks.parse("pgd-20").version] * 2
    assert [attacks.current_version(name, False) for name in ("no-such-attack", "still-going")] == [None, None]


def test_a_plugin_file_registers_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the defenses' door; what a file registered before it failed is taken out again."""
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    monkeypatch.setattr(plugins, "_FAILURES", {})
    source = (
        "from robench.attacks import register\n\n\n"
        "@register('{name}', version=1, paper='none')\n"
        "def to_black(defense, x, y, threat, *, examples, seed, share: float = 1.0):\n"
        "    return threat.project(x * (1 - share), x)\n\n\n{more}\n"
    )
    good, bad = tmp_path / "good_attack.py", tmp_path / "bad_attack.py"
    good.write_text(source.format(name="to-black", more=""))
    bad.write_text(source.format(name="to-nothing", more="raise OSError('gone')"))
    plugins.load([bad, good])
    defense, x, threat = ensemble(12), images(2, 3, 2, 2), ThreatModel.parse("Linf:0.1")
    x_adv = attacks.parse("to-black,share=1/2")(defense, x, predicted(defense, x), threat, examples=torch.arange(2), seed=0)
    torch.testing.assert_close(x_adv, torch.maximum(x / 2, x - 0.1).clamp(0, 1))
    assert "to-nothing" not in attacks.registered()
    assert [failure.reason for failure in plugins.failures()] == ["OSError: gone"]

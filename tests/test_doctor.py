"""The doctor on models whose gradients are known: honest ones are left alone, each trick is found by the check that is for it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from benchmarks.decoy_defenses import Scrambled, Table
from robench import attacks, data, doctor, noise, targets
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.attacks import Attack
from robench.cli import main
from robench.data import Dataset
from robench.defense import Defense, Ensemble, Plain
from robench.doctor import Diagnosis, attack_checks
from robench.doctor.examination import Examination, Run
from robench.doctor.finding import Finding, clearly_lower
from robench.errors import UserError
from robench.estimate import Estimate
from robench.noise import Draw
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:48/255")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits", "test").first(30)


Examine = Callable[..., Diagnosis]


@pytest.fixture
def examine(digits: Dataset) -> Examine:
    def run(module: nn.Module, threat: ThreatModel = LINF, **settings: int) -> Diagnosis:
        return doctor.examine(targets.of_module(module, "patient"), digits, threat, **settings)

    return run


def found(diagnosis: Diagnosis, check: str) -> Finding:
    (finding,) = [finding for finding in diagnosis.findings if finding.check == check]
    return finding


Function = Callable[[Tensor], Tensor]


class Changed(nn.Module):
    """A network with a function before and one after it."""

    def __init__(self, network: nn.Module, before: Function = lambda x: x, after: Function = lambda logits: logits) -> None:
        super().__init__()
        self.network = network
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class Noisy(Defense):
    """One network behind Gaussian noise, from the draw or, without one, from torch's global generator."""

    def __init__(self, network: nn.Module, size: float, random: bool = True) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.random = random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        drawn = torch.randn_like(x) if draw is None else noise.normal(draw, "noisy", tuple(x.shape[1:]))
        return self.network(x + self.size * drawn)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


# Honest models


@pytest.mark.parametrize("threat", ["Linf:16/255", "Linf:48/255", "L2:1"])
def test_honest_models_get_no_flag(examine: Examine, linear_network: nn.Module, networks: list[nn.Module], threat: str) -> None:
    for module in (linear_network, networks[0]):
        diagnosis = examine(module, ThreatModel.parse(threat))
        assert diagnosis.verdict != "likely an artefact"
        assert [finding.check for finding in diagnosis.findings if finding.flagged] == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2)])
def test_images_of_one_or_two_values_get_no_flag(shape: tuple[int, ...]) -> None:
    """There a random step may be the gradient's own."""
    images = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))
    labels = (images.flatten(1).mean(1) > 0.5).long()
    linear = nn.Linear(math.prod(shape), 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([-torch.ones(math.prod(shape)), torch.ones(math.prod(shape))]))
        linear.bias.copy_(torch.tensor([0.5, -0.5]) * math.prod(shape))
    toy = data.from_tensors(images, labels, 2, "toy")
    diagnosis = doctor.examine(targets.of_module(nn.Sequential(nn.Flatten(), linear), "patient"), toy, ThreatModel.parse("Linf:0.05"))
    assert not found(diagnosis, "ascent direction").flagged
    assert diagnosis.verdict != "likely an artefact"


def test_a_gradient_lost_inside_is_named_by_its_layer(examine: Examine, networks: list[nn.Module]) -> None:
    finding = found(examine(nn.Sequential(*networks[0][:3], Scrambled(), networks[0][3])), "gradient inside")
    assert finding.values == {"places": 1}
    assert finding.meaning.endswith("before or at module.3")


def test_what_falls_to_the_doctor_itself_is_called_not_robust(examine: Examine, linear_network: nn.Module) -> None:
    """A linear model's robust accuracy falls with the budget to 0; one answer to every image has a tenth."""
    diagnoses = [examine(linear_network, ThreatModel.parse(threat)) for threat in ("L2:0.5", "L2:3")]
    assert [diagnosis.robust_accuracy.value > 0.1 for diagnosis in diagnoses] == [True, False]
    assert [diagnosis.verdict for diagnosis in diagnoses] == ["no sign of masking", "not robust"]
    assert diagnoses[1].decided_by == ()


def test_honest_ensembles_and_random_defenses_are_no_artefacts(examine: Examine, networks: list[nn.Module]) -> None:
    assert examine(Ensemble(networks, mean_of_logits)).decided_by == ()
    diagnosis = examine(Noisy(networks[0], 0.05))
    assert diagnosis.decided_by == ()
    tiny = found(diagnosis, "tiny budget")
    assert tiny.values["clean"] == tiny.values["attacked"] > 0.9
    scored = found(diagnosis, "scoring of draws").values
    assert scored["right on all 10 draws"] <= scored["mean over draws"]
    assert found(diagnosis, "gradient across draws").values["median cosine"] > 0.3


def test_the_linear_model_is_predicted_by_its_gradient(examine: Examine, linear_network: nn.Module) -> None:
    diagnosis = examine(linear_network, ThreatModel.parse("L2:0.5"))
    assert found(diagnosis, "predicted change").values["median ratio"] == pytest.approx(1, abs=0.01)
    assert found(diagnosis, "gradient stability").values["median cosine"] == pytest.approx(1, abs=0.01)
    assert found(diagnosis, "unbounded attack").values["robust"] == 0
    assert 0 < diagnosis.robust_accuracy.value < diagnosis.clean_accuracy.value < 1
    assert diagnosis.robust_accuracy.n == diagnosis.clean_accuracy.n == 30


@pytest.mark.parametrize("text", ["Linf:1e-7", "L2:1e-400"])
def test_a_budget_that_rounding_loses_is_refused(examine: Examine, linear_network: nn.Module, text: str) -> None:
    with pytest.raises(UserError, match=r"is lost in rounding; the doctor needs more$"):
        examine(linear_network, ThreatModel.parse(text))


# Tricks

TRICKS: dict[str, tuple[Callable[[list[nn.Module]], nn.Module], set[str]]] = {
    "stopped": (lambda n: Changed(n[0], after=Tensor.detach), {"input gradients", "unbounded attack"}),
    "saturated": (lambda n: Changed(n[0], after=lambda logits: 1e4 * logits), {"input gradients", "saturation", "other loss"}),
    "rounded": (lambda n: Changed(n[0], after=lambda logits: (logits / 4).round()), {"input gradients", "ties"}),
    "shattered": (lambda n: Changed(n[0], before=lambda x: x + 0.01 * torch.sin(1e4 * x)), {"predicted change"}),
    "reversed": (lambda n: Changed(n[0], before=lambda x: 2 * x.detach() - x), {"predicted change", "ascent direction"}),
    "quantised": (lambda n: Changed(n[0], before=lambda x: (7 * x).round() / 7), {"input gradients", "everyday attack"}),
    "lost inside": (lambda n: nn.Sequential(*n[0][:3], Scrambled(), n[0][3]), {"gradient inside"}),
    "cut inside": (lambda n: nn.Sequential(*n[0][:3], Table(), n[0][3]), {"gradient inside", "input gradients"}),
    "vote": (lambda n: Ensemble(n, majority_vote), {"input gradients", "transfer", "unbounded attack"}),
    "crossmax": (lambda n: Ensemble(n, crossmax), {"transfer"}),
    "not finite": (lambda n: Changed(n[0], after=lambda logits: logits + 0 * (logits * 0).abs().sqrt()), {"input gradients"}),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_each_trick_is_found_by_its_check(examine: Examine, networks: list[nn.Module], trick: str) -> None:
    build, checks = TRICKS[trick]
    diagnosis = examine(build(networks))
    assert diagnosis.verdict == "likely an artefact"
    assert checks <= set(diagnosis.decided_by)


@pytest.mark.parametrize(
    ("plain", "strong", "state"), [(70, 65, "ok"), (70, 60, "advice"), (70, 36, "advice"), (70, 35, "flagged"), (8, 0, "ok")]
)
def test_what_another_attack_breaks_beyond_pgd_decides_only_where_it_is_most(plain: int, strong: int, state: str) -> None:
    """An honest network trained against single steps has a gradient that leads PGD astray on a few images, and stays robust."""

    def left(count: int) -> Run:
        correct = (torch.arange(100) < count).double()
        return Run(correct, correct, torch.empty(100, 0), LINF)

    patient = SimpleNamespace(
        defense=SimpleNamespace(random=False), threat=LINF, pgd=lambda *_, **__: left(plain), attack=lambda *_: left(strong)
    )
    assert doctor.state(attack_checks.everyday(patient)) == state
    patient.pgd = lambda _steps, loss="ce": left(plain if loss == "ce" else strong)
    assert doctor.state(attack_checks.other_loss(patient)) == state


def test_in_l1_apgd_stands_beside_pgd_whose_fixed_sparsity_misleads() -> None:
    def left(count: int) -> Run:
        correct = (torch.arange(100) < count).double()
        return Run(correct, correct, torch.empty(100, 0), LINF)

    def state(threat: str) -> str:
        patient = SimpleNamespace(
            defense=SimpleNamespace(random=False), threat=ThreatModel.parse(threat), pgd=lambda *_, **__: left(53),
            attack=lambda name, _attack: left(20 if name == "fast" else 28),
        )  # fmt: skip
        return doctor.state(attack_checks.everyday(patient))

    assert (state("L2:1"), state("L1:18")) == ("flagged", "ok")


def test_noise_that_is_not_declared_is_found_and_averaged_all_the_same(examine: Examine, networks: list[nn.Module]) -> None:
    before = torch.random.get_rng_state()
    diagnosis = examine(Noisy(networks[0], 0.05, random=False))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is as it was"
    assert diagnosis.decided_by == ("declaration",)
    assert found(diagnosis, "declaration").values == {"differ": 1.0}
    assert not found(diagnosis, "averaging draws").skipped


def test_probabilities_are_advised_against(examine: Examine, networks: list[nn.Module]) -> None:
    finding = found(examine(Changed(networks[0], after=lambda logits: logits.softmax(1))), "probabilities")
    assert finding.flagged
    assert not finding.decisive
    assert doctor.state(finding) == "advice"


class AlwaysTraining(nn.Module):
    """A network behind a batch norm that `eval` does not reach."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.network = network

    def train(self, mode: bool = True) -> "AlwaysTraining":
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.norm(x))


def test_training_mode_is_found(examine: Examine, networks: list[nn.Module]) -> None:
    finding = found(examine(AlwaysTraining(networks[0])), "evaluation mode")
    assert finding.flagged
    assert finding.values["modules in training mode"] > 0
    assert finding.values["depend on the batch"] > 0


def test_noise_by_the_batch_is_no_dependence_on_its_images(examine: Examine, networks: list[nn.Module]) -> None:
    """A library's noise is drawn for the whole batch, from its first image's seed."""
    module = Changed(networks[0], before=lambda x: x + 0.05 * torch.randn_like(x))
    diagnosis = examine(Plain(module, random=True))
    assert found(diagnosis, "evaluation mode").values == {"modules in training mode": 0, "depend on the batch": 0}
    assert diagnosis.decided_by == ()


# Black box: the attack is another's, and may not be there


def test_the_black_box_check_says_why_it_is_skipped(examine: Examine, networks: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = attacks.parse

    def unknown(text: str) -> Attack:
        if not text.startswith("square"):
            return parsed(text)
        raise UserError(f"unknown attack {text!r}")

    monkeypatch.setattr(attack_checks.attacks, "parse", unknown)
    finding = found(examine(networks[0]), "black-box")
    assert (finding.skipped, finding.flagged) == (True, False)
    assert "square" in finding.meaning


def test_a_stronger_black_box_is_found(examine: Examine, networks: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def all_one_image(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int) -> Tensor:
        return threat.project(x[:1].expand_as(x), x)

    parsed = attacks.parse

    def parse(text: str) -> Attack:
        if text == "fast":
            return parsed(text)
        assert text == f"square,queries={attack_checks.SQUARE_QUERIES}"
        return Attack("square", 1, {}, all_one_image)

    monkeypatch.setattr(attack_checks.attacks, "parse", parse)
    wide = ThreatModel.parse("Linf:0.9")
    finding = found(examine(Changed(networks[0], after=Tensor.detach), wide), "black-box")
    assert finding.flagged
    assert finding.values["square"] < finding.values["white-box"] - 0.5
    honest = found(examine(networks[0], wide), "black-box")
    assert not honest.flagged


# The parts


def run_of(correct: list[float], losses: Tensor | None = None) -> Run:
    values = torch.tensor(correct, dtype=torch.float64)
    return Run(values, values, torch.zeros(len(correct), 0) if losses is None else losses, LINF)


def test_clearly_lower_needs_a_difference_beyond_noise() -> None:
    def share(count: int, n: int = 100) -> Estimate:
        return Estimate.of([1.0] * count + [0.0] * (n - count))

    assert clearly_lower(share(40), share(50))
    assert not clearly_lower(share(50), share(40))
    assert not clearly_lower(share(48), share(50)), "two examples are noise"
    assert not clearly_lower(share(970, 1000), share(990, 1000)), "a difference is clear and too small to matter"
    assert not clearly_lower(share(40), share(47), by=0.1)


def test_robust_accuracy_that_rises_is_flagged() -> None:
    low, high = run_of([0.0] * 20 + [1.0] * 20), run_of([1.0] * 40)
    rising = attack_checks._falls("falls with steps", {"1": low, "10": low, "50": high}, "steps", "")
    assert rising.flagged
    assert rising.values == {"1": 0.5, "10": 0.5, "50": 1.0}
    assert not attack_checks._falls("falls with steps", {"1": high, "10": low, "50": low}, "steps", "").flagged


def test_a_loss_that_still_rises_is_told_from_one_that_is_level() -> None:
    steps = torch.arange(51.0)
    level, rising = (1 - 0.5**steps), 1.1**steps
    assert attack_checks._late_rise(run_of([1.0], level[None])) < 0.01
    assert attack_checks._late_rise(run_of([1.0], rising[None])) > attack_checks.LATE
    assert attack_checks._late_rise(run_of([0.0], rising[None])) == 0, "what is fooled needs no more steps"


def test_an_examination_attacks_once_and_only_what_is_classified_right(digits: Dataset, networks: list[nn.Module]) -> None:
    told: list[str] = []
    defense = Ensemble([networks[0]], mean_of_logits)
    patient = Examination.of(defense, digits, LINF, 0, "cpu", 100, told.append)
    with torch.no_grad():
        assert torch.equal(defense(patient.x).argmax(1), patient.y)
    assert len(patient) == round(patient.clean.value * len(digits)) < len(digits)
    assert patient.pgd(3) is patient.pgd(3)
    assert len(told) == 1
    assert patient.pgd(3).losses.shape == (len(patient), 4)
    assert patient.strongest().value == pytest.approx(patient.pgd(3).share * len(patient) / len(digits))
    patient.pgd(3, threat=LINF.scaled(Fraction(2)))
    assert patient.strongest().value == pytest.approx(patient.pgd(3).share * len(patient) / len(digits)), "another budget does not count"


def test_nothing_depends_on_the_batch_size(examine: Examine, networks: list[nn.Module]) -> None:
    pair = Ensemble(networks[:2], crossmax)
    whole, parts = examine(pair), examine(pair, batch_size=16)
    assert whole.decided_by == parts.decided_by
    for one, other in zip(whole.findings, parts.findings, strict=True):
        assert one.values == pytest.approx(other.values, abs=0.05)


# Bad input


@pytest.mark.parametrize(
    ("module", "threat", "message"),
    [
        (lambda n: n[0], "Linf:0", "needs a budget above 0"),
        (lambda n: Changed(n[0], after=lambda logits: logits[:, :7]), "Linf:0.1", r"needs logits of shape \(batch, 10\)"),
        (lambda n: Changed(n[0], after=lambda logits: logits / 0), "Linf:0.1", "not finite"),
        (lambda n: Changed(n[0], after=lambda logits: -logits), "Linf:0.1", "none of the first 30 examples of digits"),
        (lambda n: nn.Linear(3, 10), "Linf:0.1", "patient fails on images of shape"),
    ],
)
def test_bad_input_is_one_line(
    examine: Examine, networks: list[nn.Module], module: Callable[[list[nn.Module]], nn.Module], threat: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        examine(module(networks), ThreatModel.parse(threat))
    assert "\n" not in str(raised.value)


# The command line

MODELS = """
import torch
from torch import nn
from robench import data

def honest():
    split = data.load("digits", "train")
    x = split.images.flatten(1) / 255
    means = torch.stack([x[split.labels == c].mean(0) for c in range(10)])
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with torch.no_grad():
        network[1].weight.copy_(0.2 * means)
        network[1].bias.copy_(-0.1 * (means ** 2).sum(1))
    return network

class Stopped(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = honest()

    def forward(self, x):
        return self.network(x).detach()
"""


@pytest.fixture
def robench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(main, ["doctor", *arguments, "--n", "30", "--device", "cpu", "--threat", "Linf:48/255"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_the_command_shows_every_finding_and_ends_with_0_for_an_honest_model(robench: Callable[..., Result], tmp_path: Path) -> None:
    result = robench("models.py:honest", "--json", "out/findings.json", "--seed", "3")
    assert result.exit_code == 0, result.output
    facts = dict(line.split("  ", 1) for line in result.stdout.splitlines() if line[:1].isalpha())
    assert facts["verdict"].strip() == "no sign of masking"
    assert "models.py:honest within Linf:48/255: unbounded" in result.stderr
    content = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert (content["verdict"], content["decided_by"], content["seed"], content["n"]) == ("no sign of masking", [], 3, 30)
    assert (content["defense"]["name"], content["scale"]) == ("models.py:honest", "smoke")
    assert len(content["defense"]["weights_sha256"]) == 64
    assert content["provenance"]["device"] == "cpu"
    assert content["clean_accuracy"].keys() == {"value", "low", "high", "n"}
    assert len(content["findings"]) == len(doctor.CHECKS) + 3
    for finding in content["findings"]:
        assert finding["values"] or finding["skipped"]
        assert finding["check"] in result.stdout


def test_the_command_ends_with_1_for_an_artefact_and_prints_only_json_where_asked(robench: Callable[..., Result]) -> None:
    result = robench("models.py:Stopped", "--json", "-")
    assert result.exit_code == 1, result.output
    content = json.loads(result.stdout)
    assert content["verdict"] == "likely an artefact"
    assert "input gradients" in content["decided_by"]
    (gradients,) = [finding for finding in content["findings"] if finding["check"] == "input gradients"]
    assert gradients["values"]["no gradient at all"] == 1
    assert "verdict          likely an artefact: input gradients" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "nothing"),
        (("models.py:honest", "--threat", "Linf:0"), "needs a budget above 0"),
        (("models.py:honest", "--n", "0"), "n = 0 is not between 1 and"),
        (("models.py:honest", "--device", "tpu"), "no device 'tpu'"),
    ],
)
def test_the_command_ends_with_2_and_one_line_for_bad_input(
    robench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("robench: error: ")
    assert message in line


def test_one_class_is_refused_in_one_line(digits: Dataset) -> None:
    dataset = replace(digits.first(8), labels=torch.zeros(8, dtype=torch.long), classes=("all",))
    with pytest.raises(UserError, match="at least 2 classes"):
        doctor.examine(targets.of_module(nn.Sequential(nn.Flatten(), nn.Linear(3, 1)), "one"), dataset, LINF)

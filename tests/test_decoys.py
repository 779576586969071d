"""Decoys keep their networks' accuracy, depend on nothing but the draw, and hide what breaks their networks."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks import decoys
from benchmarks.decoy_defenses import DECOYS, honest
from benchmarks.decoys import Case
from robench import attacks, data
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.evaluation import measure
from robench.noise import Draw
from robench.scoring import predictions
from robench.targets import Target
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:48/255")
SEEMING = (
    "quantised_input", "shattered", "scrambled_gradient", "jpeg", "tabulated_features", "scrambled_features", "steep_softmax",
)  # fmt: skip
NO_GRADIENT = ("rounded_logits", "stopped_gradient", "hard_vote", "quantised_input", "thermometer", "jpeg", "palette", "tabulated_features")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits", "test").first(60)


@pytest.fixture(scope="session")
def images(digits: Dataset) -> Tensor:
    return as_float(digits.images)


def build(name: str, networks: Sequence[nn.Module]) -> Defense:
    return DECOYS[name].build(networks[: DECOYS[name].networks]).eval()


def accuracy(defense: Defense, images: Tensor, digits: Dataset) -> float:
    return float((predictions(defense, images, torch.arange(len(images)), 0) == digits.labels).double().mean())


def test_there_are_enough_decoys_and_four_are_held_out() -> None:
    assert len(DECOYS) >= 14
    assert {name for name, decoy in DECOYS.items() if decoy.held_out} == {"steep_staircase", "detector", "k_winners", "resize_and_pad"}
    assert all(decoy.summary.endswith(".") for decoy in DECOYS.values())


@pytest.mark.parametrize("name", DECOYS)
def test_a_decoy_keeps_its_networks_clean_accuracy(name: str, networks: list[nn.Module], images: Tensor, digits: Dataset) -> None:
    undefended = accuracy(honest(networks[: DECOYS[name].networks]), images, digits)
    assert undefended > 0.9
    assert accuracy(build(name, networks), images, digits) > undefended - 0.1


@pytest.mark.parametrize("name", DECOYS)
def test_a_decoy_is_a_function_of_image_and_draw(name: str, networks: list[nn.Module], images: Tensor) -> None:
    defense, names = build(name, networks), torch.arange(10)
    before = torch.random.get_rng_state()

    def logits(x: Tensor, examples: Tensor, number: int = 0) -> Tensor:
        return defense(x, Draw(1, examples, number) if defense.random else None)

    with torch.no_grad():
        whole = logits(images[:10], names)
        assert torch.equal(whole, logits(images[:10], names))
        alone = torch.cat([logits(images[i : i + 1], names[i : i + 1]) for i in range(10)])
        assert torch.allclose(whole, alone, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        assert torch.equal(whole, logits(images[:10], names, 1)) is not defense.random
        assert whole.shape == (10, 10)
        if not defense.random:
            assert torch.equal(whole, defense.aggregate(defense.predictors(images[:10])))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert defense.members()


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_decoys_without_a_gradient_have_none(name: str, networks: list[nn.Module], images: Tensor) -> None:
    x = images[:5].clone().requires_grad_()
    logits = build(name, networks)(x)
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        assert not gradient.any()


@pytest.mark.parametrize("name", SEEMING)
def test_a_decoy_seems_robust_and_is_not(name: str, networks: list[nn.Module], digits: Dataset) -> None:
    case = Case(name, build(name, networks), honest(networks[:1]))
    few = digits.first(20)
    seeming = measure(Target(case.defense, name), few, LINF, attacks.parse("pgd-10")).robust_accuracy.value
    assert decoys.truth(case, few, LINF, 0) < 0.1
    assert seeming > 0.5


def test_the_dct_decoy_is_the_identity_but_for_rounding(networks: list[nn.Module], images: Tensor) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :10]

    build("jpeg", [Spy()])(images)
    assert 0 < float((seen[0] - images).abs().mean()) < 0.05
    flat = torch.full((1, 3, 16, 16), 0.5)
    build("jpeg", [Spy()])(flat)
    assert float((seen[1] - flat).abs().max()) < 1e-2, "a constant is one coefficient of each block"


def test_dropout_scales_what_is_left(networks: list[nn.Module], images: Tensor) -> None:
    defense = build("dropout", networks)
    with torch.no_grad():
        plain = networks[0](images[:20])
        mean = torch.stack([defense(images[:20], Draw(0, torch.arange(20), number)) for number in range(200)]).mean(0)
    assert float((mean - plain).abs().mean()) < 0.15 * float(plain.abs().mean())


Decoys = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, networks: list[nn.Module], capsys: pytest.CaptureFixture[str]) -> Decoys:
    """Run the benchmark with the small networks in the place of trained ones; return its exit code, stdout and stderr."""

    def trained(named: object, dataset: object, seed: int = 0, **_settings: object) -> Target:
        return Target(honest(networks[seed : seed + 1]), "network")

    monkeypatch.setattr(decoys.targets, "trained", trained)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = decoys.main(arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_the_table_has_a_row_for_each_and_leaves_out_what_is_not_registered(run: Decoys) -> None:
    names = ["natural", "hard_vote", "steep_staircase"]
    code, out, err = run("--n", "15", "--attacks", "pyautoattack-rand", "apgd-ce,steps=5", "no-such-attack", "--only", *names)
    assert code == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    headers = "defense, clean, truth, pyautoattack-rand, apgd-ce:steps=5, doctor's attacks, doctor's verdict, because of"
    assert lines[0] == [header.replace(":", ",") for header in headers.split(", ")]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(rows) == ["natural", "hard_vote", "steep_staircase (held out)"]
    assert rows["natural"]["doctor's verdict"] == "not robust"
    assert rows["natural"]["truth"] == rows["natural"]["doctor's attacks"] == "0"
    assert rows["hard_vote"]["doctor's verdict"] == "likely an artefact"
    assert int(rows["hard_vote"]["apgd-ce,steps=5"]) > 50
    assert rows["hard_vote"]["pyautoattack-rand"] == "-", "it is for random defenses"
    assert "left out: unknown attack 'no-such-attack'" in err


def test_an_attack_that_refuses_is_a_cell(run: Decoys) -> None:
    code, out, err = run("--n", "5", "--attacks", "pyautoattack", "--only", "hard_vote")
    assert code == 0
    assert "| refused " in out
    assert "needs a gradient" in err


@pytest.mark.parametrize(("arguments", "message"), [(("--only", "nothing"), "unknown decoys nothing"), (("--threat", "8"), "threat model")])
def test_bad_input_is_one_line(run: Decoys, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1

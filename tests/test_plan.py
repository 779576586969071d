"""Plans: those that ship can be read, and what is wrong with one is said in a line that names the key."""

from pathlib import Path

import pytest

from robench import plan
from robench.errors import UserError

GOOD = """
dataset = "digits"
scale = "smoke"
n = 40

[[measure]]
defenses = ["baseline"]
threats = ["Linf:16/255"]
attacks = ["pgd-2,loss=ce"]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "plan.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(plan.shipped()))
def test_a_plan_that_ships_can_be_read(name: str) -> None:
    made = plan.load(name)
    assert made.claims
    assert all(table.names for table in made.measure)


def test_the_plans_cover_every_defense_of_the_papers() -> None:
    for name in ("smoke", "cpu", "gpu"):
        named = {defense.partition(",")[0] for table in plan.load(name).measure for defense in table.names}
        assert {
            "natural",
            "double_adv",
            "gated2_adv",
            "composite_pair",
            "robust_average",
            "multires_ensemble3_adv",
            "multires_ablation",
        } <= named


def test_names_are_read_as_full_ones(tmp_path: Path) -> None:
    (table,) = plan.load(written(tmp_path, GOOD)).measure
    assert table.names == ("natural",)
    assert table.attacks == ["pgd-2"]
    assert table.threats == ["Linf:16/255"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('scale = "smoke"', 'scale = "huge"', "scale: "),
        ("n = 40", "n = 0", "n: "),
        ("n = 40", "speed = 3", "speed: "),
        ('"baseline"', '"baselin"', "measure.0.defenses: .*baselin.*did you mean"),
        ("Linf:16/255", "Linf:-1", "measure.0.threats: "),
        ('"pgd-2,loss=ce"', '"pgd"', "measure.0.attacks: "),
        ('defenses = ["baseline"]', 'papers = ["fame"]', "measure.0.papers: no defense of the zoo is of the paper 'fame'"),
        ('defenses = ["baseline"]', "", "measure.0: name defenses or papers"),
        ("[[measure]]", "[[measure", "is not TOML"),
    ],
)
def test_a_plan_that_is_wrong_is_an_error_of_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        plan.load(written(tmp_path, GOOD.replace(old, new, 1)))
    assert "\n" not in str(raised.value)


def test_an_empty_plan_and_an_unknown_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        plan.load(written(tmp_path, 'dataset = "digits"\nscale = "smoke"\n'))
    with pytest.raises(UserError, match=r"no plan 'smok'.*did you mean 'smoke'"):
        plan.load("smok")

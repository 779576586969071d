from pathlib import Path

import pytest

from robench.estimate import Estimate
from robench.figures import accuracy_curves

CURVES = {
    "natural": [(0.0, Estimate.proportion(95, 100)), (8.0, Estimate.proportion(5, 100))],
    "single_adv": [(0.0, Estimate.proportion(90, 100)), (8.0, Estimate.proportion(60, 100))],
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_curves_make_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        accuracy_curves(CURVES, path, title="title", budget="budget")
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5000


def test_every_defense_and_label_is_in_the_figure(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        accuracy_curves(CURVES, tmp_path / "figure.svg", title="a title", budget="a budget")
    text = (tmp_path / "figure.svg").read_text()
    assert all(label in text for label in ("natural", "single_adv", "a title", "a budget"))

"""What is still to be trained is what training would do: no more, no less."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from robench import data, targets, zoo
from robench.errors import OutOfTimeError, UserError
from robench.remaining import remaining

EPOCHS, DONE = 4, 3
SPLIT = data.load("digits", "train")


def epochs_left(cache: Path) -> list[int]:
    named = zoo.parse(f"tiny,epochs={EPOCHS}")
    return [stage.epochs for stage in remaining(named, targets.setting_for(SPLIT, "smoke", 0), SPLIT, cache=cache)]


def epochs_trained(cache: Path, stop_after: int = EPOCHS) -> int:
    """Train, until a number of epochs is done in all, and return how many this took."""
    lines: list[str] = []
    with contextlib.suppress(OutOfTimeError):
        targets.trained(
            zoo.parse(f"tiny,epochs={EPOCHS}"), SPLIT, scale="smoke", cache=cache, progress=lines.append,
            stop=lambda: len(lines) == stop_after,
        )  # fmt: skip
    return len(lines)


@pytest.fixture
def checkpoint(tiny: Callable[..., None], tmp_path: Path) -> Path:
    """The checkpoint of a training that was stopped after three of four epochs."""
    assert epochs_left(tmp_path) == [EPOCHS]
    assert epochs_trained(tmp_path, stop_after=DONE) == DONE
    (path,) = tmp_path.glob("training/*.checkpoint")
    return path


def test_the_epochs_of_a_checkpoint_are_not_still_to_train(checkpoint: Path, tmp_path: Path) -> None:
    assert epochs_left(tmp_path) == [EPOCHS - DONE] == [epochs_trained(tmp_path)]
    assert epochs_left(tmp_path) == []


def test_a_checkpoint_without_a_history_is_not_counted_since_training_does_not_go_on_from_it(checkpoint: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(checkpoint), checkpoint)
    assert epochs_left(tmp_path) == [EPOCHS] == [epochs_trained(tmp_path)]


def test_a_corrupt_checkpoint_is_an_error_of_one_line(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(b"{")
    with pytest.raises(UserError, match=r"checkpoint is corrupt or unreadable \(.*\); delete it to train again$"):
        epochs_left(tmp_path)

import pytest

from robench import duration
from robench.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90), ("90s", 90), ("9m", 540), ("1.5m", 90), ("1h", 3600), ("1h30m", 5400), ("2h5s", 7205), (" 1h2m3s ", 3723),
        ("0.25", 0.25), ("0m1s", 1),
    ],
)  # fmt: skip
def test_what_people_write(text: str, expected: float) -> None:
    assert duration.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "m", "9 m", "30m1h", "1d", "9min", "1e3", "nan", "inf", "1h30"])
def test_anything_else_is_one_clear_line(text: str) -> None:
    with pytest.raises(UserError, match="is no duration above 0; write 90s, 9m, 1h30m") as error:
        duration.seconds(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "60 s"), (60, "1.0 min"), (570, "9.5 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min")],
)
def test_what_readers_take_in(seconds: float, expected: str) -> None:
    assert duration.written(seconds) == expected

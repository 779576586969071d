"""Durations as people write them: ``90``, ``90s``, ``9m``, ``1h30m``."""

import re

from robench.errors import UserError

_PATTERN = re.compile(r"(?:(?P<h>\d+)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?|(?P<plain>\d+(?:\.\d+)?)")


def seconds(text: str) -> float:
    """Return the seconds of a duration above 0: hours, minutes and seconds in this order (``1h30m``), or a plain number of seconds.

    Raises:
        UserError: for anything else.
    """
    found = _PATTERN.fullmatch(text.strip())
    units = {"h": 3600, "m": 60, "s": 1, "plain": 1}
    total = sum(float(found[unit] or 0) * size for unit, size in units.items()) if found else 0.0
    if total <= 0:
        raise UserError(f"{text!r} is no duration above 0; write 90s, 9m, 1h30m, or a number of seconds")
    return total


def written(duration: float) -> str:
    """Return a duration in seconds as a reader takes it in: ``40 s``, ``9.5 min``, ``1 h 30 min``."""
    if duration < 60:
        return f"{duration:.0f} s"
    if round(duration / 60, 1) < 60:
        return f"{duration / 60:.1f} min"
    minutes = round(duration / 60)
    return f"{minutes // 60} h {minutes % 60} min"

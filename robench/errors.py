"""The one error that a user's mistake raises, and the one of work that its time ended.

ValueError
 └── UserError         bad input: one clear line, exit code 2 on the command line
Exception
 └── OutOfTimeError    stopped where it can go on; what was finished is kept
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names what was wrong and what would be right."""


class OutOfTimeError(Exception):
    """Training or an evaluation was asked to stop; what it had finished is in the cache, and the next run goes on from there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'a' or 'b'?)"`` for the known names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""

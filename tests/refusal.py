"""What tests of bad input share: the one line that a refusal says."""

import pytest

from robench.errors import UserError


def refused(call, *arguments, **keywords) -> str:
    """Return the one-line message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message

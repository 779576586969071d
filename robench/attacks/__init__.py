"""Attacks by name: pure functions ``(defense, x, y, threat, *, examples, seed, ...) -> x_adv``, one paper per file."""

from robench.attacks import adaptive as _adaptive  # noqa: F401  (registers)
from robench.attacks import apgd as _apgd  # noqa: F401
from robench.attacks import autoattack as _autoattack  # noqa: F401
from robench.attacks import fab as _fab  # noqa: F401
from robench.attacks import fast as _fast  # noqa: F401
from robench.attacks import momentum as _momentum  # noqa: F401
from robench.attacks import pgd as _pgd  # noqa: F401
from robench.attacks import pyautoattack as _pyautoattack  # noqa: F401
from robench.attacks import square as _square  # noqa: F401
from robench.attacks import universal as _universal  # noqa: F401
from robench.attacks.registry import Attack, Found, RegisteredAttack, current_version, parse, register, registered
from robench.attacks.transfer import mean_surrogate, transfer

__all__ = ["Attack", "Found", "RegisteredAttack", "current_version", "mean_surrogate", "parse", "register", "registered", "transfer"]

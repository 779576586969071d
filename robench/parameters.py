"""Names with parameters, ``robust_average,k=8,eps=0.22``: read by the type that the function's signature gives each one."""

import inspect
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from robench.errors import UserError, nearest

Value = str | int | float | bool | None

# An exponent of many digits would take a number of as many digits to write out.
_NUMBER = re.compile(r"[+-]?(\d{1,400}\.?\d{0,400}|\.\d{1,400})(e[+-]?\d{1,3})?(/\d{1,400})?", re.ASCII | re.IGNORECASE)


def exact(text: str) -> Fraction:
    """Return the number that a text writes, as it is written: ``8/255``, ``0.5``, ``1e-3``.

    Raises:
        ValueError: for what is no number, or one of more than 400 digits.
        ZeroDivisionError: for a fraction of zero.
    """
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is no number")
    return Fraction(text)


def keyword_parameters(function: Callable[..., Any], without: tuple[str, ...] = ()) -> dict[str, Value]:
    """Return a function's keyword-only parameters with their defaults (None for one that has none)."""
    return {
        name: (None if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in without
    }


def check_registration(
    owner: str, function: Callable[..., Any], version: object, given: tuple[str, ...], named: tuple[str, ...] = ()
) -> None:
    """Make sure that what a plugin registers can be called as it will be, and kept by its version.

    Args:
        owner: what is registered, for messages (``attack 'pgd'``).
        function: takes the values `given` by position, those `named` by keyword, and keyword-only parameters with defaults.
        version: its version.
        given: what the function is given by position, in order.
        named: what it is given by keyword.

    Raises:
        UserError: if it does not, or the version is no whole number of at least 1.
    """
    if type(version) is not int or version < 1:
        raise UserError(f"{owner}: its version is {version!r}; a version is a whole number of at least 1")
    try:
        inspect.signature(function).bind(*given, **dict.fromkeys(named))
    except TypeError as error:
        form = ", ".join([*given, *(["*", *named] if named else [])])
        raise UserError(f"{owner} cannot be called as ({form}): {error}; its own parameters are keyword-only, with defaults") from error


def read_settings(owner: str, function: Callable[..., Any], settings: list[str], known: Mapping[str, Value]) -> dict[str, Value]:
    """Read ``key=value`` texts into values of the types that `function` annotates.

    Args:
        owner: what the parameters belong to, for messages (``attack 'pgd-20'``).
        function: whose signature gives the types: str, int, float (``8/255`` is one) or bool.
        settings: the texts.
        known: the parameters that may be set.

    Raises:
        UserError: for a text without ``=``, an unknown key (naming the nearest), a key that is given twice, or a value of the wrong type.
    """
    values: dict[str, Value] = {}
    for setting in settings:
        key, separator, text = (part.strip() for part in setting.partition("="))
        if not separator and key in known:
            raise UserError(f"{owner}: {key} needs a value, as in {key}={known[key]}")
        if key not in known:
            raise UserError(f"{owner} has no parameter {key!r}; it has {', '.join(known) or 'none'}{nearest(key, known)}")
        if key in values:
            raise UserError(f"{owner} is given {key!r} twice; give it once")
        values[key] = _converted(owner, key, text, inspect.signature(function).parameters[key].annotation)
    return values


def _converted(owner: str, key: str, text: str, annotation: Any) -> Value:
    kinds = [kind for kind in (bool, int, float, str) if annotation is kind or kind in getattr(annotation, "__args__", ())]
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if kind is float:
                return float(exact(text))
            if kind in (int, str):
                return int(text) if kind is int else text
        except (ValueError, ZeroDivisionError, OverflowError):
            continue
    raise UserError(f"{owner}: {key}={text!r} is not of type {' or '.join(kind.__name__ for kind in kinds)}")


def written(name: str, parameters: Mapping[str, Value]) -> str:
    """Return the text form, ``name,key=value,...``, with floats as short as they read back exactly."""
    return ",".join([name, *(f"{key}={value}" for key, value in parameters.items() if value is not None)])

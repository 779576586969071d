"""robench settles whether a defense's robustness claim holds.

The names below are loaded when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robench.defense import Defense, Ensemble
    from robench.errors import UserError
    from robench.estimate import Estimate
    from robench.evaluation import evaluate
    from robench.noise import Draw
    from robench.record import Record
    from robench.threat import ThreatModel

__version__ = version("robench")

__all__ = ["Defense", "Draw", "Ensemble", "Estimate", "Record", "ThreatModel", "UserError", "evaluate"]

_HOMES = {
    "Defense": "defense", "Draw": "noise", "Ensemble": "defense", "Estimate": "estimate", "Record": "record",
    "ThreatModel": "threat", "UserError": "errors", "evaluate": "evaluation",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robench' has no attribute {name!r}")
    value = getattr(import_module(f"robench.{_HOMES[name]}"), name)
    # The next use finds the name itself.
    globals()[name] = value
    return value

"""The command line. Exit codes: 0 done, 1 a claim or check failed, 2 bad usage or input, 130 interrupted.

Commands import what they need, so that ``robench --help`` does not wait for torch.
"""

from robench.cli import defenses, evaluation, results
from robench.cli.common import main

__all__ = ["defenses", "evaluation", "main", "results"]

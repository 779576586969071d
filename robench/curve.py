"""The area under a robustness curve, accuracy against budget ("Revisiting Ensembles", arXiv 2002.11572, table 1)."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from robench.errors import UserError
from robench.estimate import Estimate, average

Rule = Literal["right", "trapezoid"]


def auc(budgets: Sequence[float | Fraction], accuracies: Sequence[Estimate], rule: Rule = "right") -> Estimate:
    """Return the area under the accuracy curve up to the largest budget, divided by that budget: a share in [0, 1].

    The rule ``right`` is a Riemann sum with the accuracy at the right end of each step. It leaves the natural
    accuracy out, and it is the rule that gives the AUC column of the paper's table 1, in all rows. The rule
    ``trapezoid`` is the integral of the piecewise linear curve, natural accuracy included; the two can rank defenses
    differently (they do in that table).

    Args:
        budgets: increasing, at least 0, in one norm; a 0 stands for the natural accuracy.
        accuracies: the accuracy at each budget. With per-example values the result has them too and can be paired.
        rule: ``right`` or ``trapezoid``; ``trapezoid`` needs the budget 0.

    Raises:
        UserError: for budgets that do not increase, or are not as many as the accuracies, or lack what the rule needs.
    """
    if len(budgets) != len(accuracies):
        raise UserError(f"{len(budgets)} budgets need as many accuracies, not {len(accuracies)}")
    increasing = all(left < right for left, right in pairwise(budgets))
    if not budgets or not (increasing and budgets[0] >= 0 and 0 < budgets[-1] < math.inf):
        raise UserError(f"the budgets of a curve must increase from 0 or more, not be {[str(b) for b in budgets]}")
    # Fractions keep the weights exact, so that they sum to 1.
    points = [Fraction(str(budget)) for budget in budgets]
    if rule == "trapezoid":
        if points[0] != 0:
            raise UserError("the trapezoid rule needs the natural accuracy, at budget 0")
        padded = [points[0], *points, points[-1]]
        weights = [(right - left) / 2 for left, right in zip(padded, padded[2:], strict=False)]
    elif rule == "right":
        weights = [right - left for left, right in pairwise([Fraction(0), *points])]
    else:
        raise UserError(f"unknown rule {rule!r}; known: right, trapezoid")
    used = [(float(weight / points[-1]), accuracy) for weight, accuracy in zip(weights, accuracies, strict=True) if weight]
    return average(used)

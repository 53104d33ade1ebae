"""The statistics of comparing settings: standard deviation over seeds, t-test, Holm's correction, power.

Pure functions on numbers. What can't be known is nan, and what is computed from it is nan too.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.special import nctdtrinc, stdtr, stdtrit

LEVEL = 0.05  # probability of calling any difference of a table significant where there is none
POWER = 0.8  # probability of calling the smallest detectable difference significant


class Estimate(NamedTuple):
    """An estimated standard deviation or standard error, and its degrees of freedom; nan and 0 where there is none."""

    value: float
    dof: float


UNKNOWN = Estimate(math.nan, 0)


def pooled_std(samples: Iterable[Sequence[float]]) -> Estimate:
    """The standard deviation within samples that may have different means. Samples of one value are ignored; UNKNOWN
    if there are no others."""
    repeated = [sample for sample in samples if len(sample) > 1]
    dof = sum(len(sample) - 1 for sample in repeated)
    if not dof:
        return UNKNOWN
    squares = math.fsum((len(sample) - 1) * statistics.variance(sample) for sample in repeated)
    return Estimate(math.sqrt(squares / dof), dof)


def error_of_difference(std: Estimate, count: int, other_std: Estimate, other_count: int) -> Estimate:
    """The standard error of the difference between the means of two samples of `count` and `other_count` values.

    Where both have the same estimate of the standard deviation, the degrees of freedom are its own: Student's test. Otherwise
    they are approximated (Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 34, 1947; Satterthwaite, "An approximate distribution of estimates of variance components",
    Biometrics Bulletin 2, 1946).
    """
    if std == other_std:
        return Estimate(std.value * math.sqrt(1 / count + 1 / other_count), std.dof)
    if not std.dof or not other_std.dof:
        return UNKNOWN
    variance, other_variance = std.value ** 2 / count, other_std.value ** 2 / other_count
    total = variance + other_variance
    if not total:
        return Estimate(0.0, std.dof + other_std.dof)
    return Estimate(math.sqrt(total), total ** 2 / (variance ** 2 / std.dof + other_variance ** 2 / other_std.dof))


def t_test(difference: float, error: Estimate) -> float:
    """The p value of Student's two-sided t-test: how probable a difference so far from 0 is where there is none.

    nan without a standard error, and where it is 0: equal accuracies show a small test set, not that nothing varies.
    """
    return 2 * float(stdtr(error.dof, -abs(difference) / error.value)) if error.dof and error.value else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number, in the same order: those up to a level hold at that level for all together
    (Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979).

    nan stays nan, and doesn't count.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))  # no p value falls below a smaller one's
        corrected[place] = least
    return corrected


def detectable_difference(error: Estimate, comparisons: int = 1) -> float:
    """The smallest true difference that the t-test finds significant with probability POWER, when it is one of so many
    `comparisons` that share LEVEL (Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2).

    By the noncentral t distribution. LEVEL / comparisons is the strictest level of Holm's correction.
    """
    if not error.dof or not error.value:
        return math.nan
    critical = stdtrit(error.dof, 1 - LEVEL / comparisons / 2)
    return float(nctdtrinc(error.dof, 1 - POWER, critical)) * error.value

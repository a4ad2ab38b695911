"""Means and differences over seeds, with what they are uncertain by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value alone has not (nan)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


@dataclass(frozen=True)
class Difference:
    """The mean of `count` paired differences with its interval of 95 %; nan for one pair."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_shown(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference | None:
    """Over the seeds that both have: mean ± t s / sqrt(n), t the 97.5 % quantile of Student's
    distribution with n - 1 degrees of freedom; None without a pair."""
    pairs = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not pairs:
        return None
    mean, error = mean_and_error(pairs)
    half = student_quantile(0.975, len(pairs) - 1) * error if len(pairs) > 1 else math.nan
    return Difference(mean, mean - half, mean + half, len(pairs))


def student_quantile(probability: float, degrees: int) -> float:
    """Where Student's distribution function has this value (above a half), by bisection."""
    low, high = 0.0, 1.0
    while _student_distribution(high, degrees) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if _student_distribution(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _student_distribution(t: float, degrees: int) -> float:
    """P(T <= t), by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4, which give P(|T| <= t))."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for n in range(2 + odd, degrees - 1, 2):
        term *= (n - 1) / n * math.cos(angle) ** 2
        total += term
    central = math.sin(angle) * total
    if odd:
        central = (angle + central) * 2 / math.pi
    return 0.5 + central / 2

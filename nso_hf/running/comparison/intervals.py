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
    from scipy.stats import t

    mean, error = mean_and_error(pairs)
    half = t.ppf(0.975, len(pairs) - 1).item() * error if len(pairs) > 1 else math.nan
    return Difference(mean, mean - half, mean + half, len(pairs))

"""Means over questions or texts, and how they change when the same are measured again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Of each text its loss summed over tokens, and how many those are; of each question whether
    the answer is right, and 1."""

    sums: Sequence[float]
    counts: Sequence[int]

    @property
    def mean(self) -> float:
        """Per token, or question."""
        return sum(self.sums) / sum(self.counts)

    @property
    def stderr(self) -> float:
        """Its standard error over texts, or questions, drawn at random: with s_i and n_i of text i
        and the mean m = sum s / sum n, sqrt(k / (k - 1) sum_i (s_i - m n_i)^2) / sum n (that of a
        ratio of two means; Cochran, Sampling Techniques, 1977, equation 2.45)."""
        k, mean = len(self.sums), self.mean
        squares = ((s - mean * n) ** 2 for s, n in zip(self.sums, self.counts, strict=True))
        return math.sqrt(k / (k - 1) * sum(squares)) / sum(self.counts)

    def summary(self, measure: str) -> dict[str, float]:
        """The mean by its name, and its standard error."""
        return {measure: self.mean, "stderr": self.stderr}

    def since(self, before: "Measured") -> "Measured":
        """The change of each text, or question: its standard error is that of pairs."""
        assert list(before.counts) == list(self.counts)
        changes = [now - then for now, then in zip(self.sums, before.sums, strict=True)]
        return Measured(changes, self.counts)


def before_and_after(
    kind: str, measure: str, before: Measured | None, after: Measured | None
) -> dict[str, Any]:
    """What results.json has on a data set of a `kind`, whose mean is called by the `measure`."""
    found = {
        name: measured.summary(measure) if measured else None
        for name, measured in (("before", before), ("after", after))
    }
    change = after.since(before) if before and after else None
    return {
        "kind": kind,
        **found,
        "change": change.mean if change else None,
        "change_stderr": change.stderr if change else None,
    }

"""Means over questions or texts, and how they change when the same are measured again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def mean_of_sums(sums: Tensor, counts: Tensor) -> float:
    """The mean of what examples have several of each, by the sum s_i and the number n_i of
    example i, both (k,): sum s / sum n."""
    return (sums.sum() / counts.sum()).item()


def error_of_sums(sums: Tensor, counts: Tensor) -> float:
    """The standard error of this mean m over examples drawn at random,

        sqrt(k / (k - 1) sum_i (s_i - m n_i)^2) / sum n

    (that of a ratio of two means; Cochran, Sampling Techniques, 1977, equation 2.45). One example
    alone has none (nan)."""
    k = len(sums)
    if k < 2:
        return math.nan
    deltas = sums - mean_of_sums(sums, counts) * counts
    return (k / (k - 1) * deltas.square().sum()).sqrt().item() / counts.sum().item()


@dataclass(frozen=True)
class Measured:
    """Of each text its loss summed over tokens, and how many those are; of each question whether
    the answer is right, and 1."""

    sums: Sequence[float]
    counts: Sequence[int]

    @property
    def mean(self) -> float:
        """Per token, or question."""
        return mean_of_sums(*self._tensors())

    @property
    def stderr(self) -> float:
        """Over texts, or questions, drawn at random."""
        return error_of_sums(*self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor(self.sums, dtype=torch.double),
            torch.tensor(self.counts, dtype=torch.double),
        )

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

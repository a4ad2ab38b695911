"""Dealing out examples by their classes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Splits:
    """Indices of the examples of each split, ascending, and the labels that are trained on."""

    train: list[int]
    validation: list[int]
    test: list[int]
    """Of those that were held out; none where the test has a split of its own."""
    labels: Tensor
    """Of the training examples, as they are trained on (m,)."""
    true_labels: Tensor
    """As they are (m,)."""

    @property
    def wrong(self) -> list[int]:
        """The places in `train` whose label is wrong."""
        places: list[int] = (self.labels != self.true_labels).nonzero().flatten().tolist()
        return places


def hold_out(labels: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the examples kept and of `number` held out, each ascending, by the labels (n,).

    Of a class with n_c examples, number n_c / n are held out, to less than one; more hold out all
    that fewer do.
    """
    order, rank = _ranked(labels, generator)
    place = (rank + 0.5) / labels.bincount()[labels]  # of each in its class, in (0, 1)
    by_place = order[place[order].argsort(stable=True)]
    return by_place[number:].sort().values, by_place[:number].sort().values


def few(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of `per_class` examples of each class, ascending; more have all that fewer do."""
    return (_ranked(labels, generator)[1] < per_class).nonzero().flatten()


def _ranked(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random order of examples (n,), and how many of its class come before each in it (n,)."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(labels)) - first
    return order, rank

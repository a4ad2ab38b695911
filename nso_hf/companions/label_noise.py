"""Wrong labels on purpose: symmetric noise, to measure what a method memorises."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nso_hf.refusal import check_integer, check_range, refusal


@dataclass(frozen=True)
class NoisyLabels:
    """Labels of n examples, some of them wrong."""

    labels: Tensor
    """n integers."""
    changed: Tensor
    """n booleans: whether the label is another than it was."""


def with_label_noise(
    labels: Tensor | Sequence[int], *, rate: float, num_labels: int, seed: int | torch.Generator = 0
) -> NoisyLabels:
    """Change each label with probability `rate`, to any of the others with the same probability.

    For a data set with a column of labels:

        noisy = with_label_noise(dataset["label"], rate=0.4, num_labels=10)
        dataset = dataset.map(lambda _, i: {"label": noisy.labels[i].item()}, with_indices=True)

    Args:
        labels: n integers in [0, num_labels).
        rate: in [0, 1]; at (num_labels - 1)/num_labels the labels say nothing.
        seed: of the draws, or the generator that makes them.

    Raises:
        ValueError: one of them is out of its range.
    """
    check_range("rate", rate, 0, 1, "Typical values are 0.2 to 0.8")
    check_integer("num_labels", num_labels, 2, "It is the number of classes")
    given: Any = labels if isinstance(labels, Tensor) else list(labels)
    given = torch.as_tensor(given)
    if given.is_floating_point() or given.dim() != 1 or not _are_classes(given, num_labels):
        rule = f"must be one integer for each example, at least 0 and below {num_labels}"
        raise refusal("labels", _described(given), rule, "Pass classes, and how many there are")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    changed = torch.rand(len(given), generator=generator) < rate
    others = torch.randint(1, num_labels, (len(given),), generator=generator)
    wrong = (given + others.to(given.device)) % num_labels
    return NoisyLabels(torch.where(changed.to(given.device), wrong, given), changed)


def _are_classes(labels: Tensor, number: int) -> bool:
    return len(labels) == 0 or bool(labels.min() >= 0 and labels.max() < number)


def _described(labels: Tensor) -> str:
    kind = str(labels.dtype).removeprefix("torch.")
    ends = f" from {labels.min()} to {labels.max()}" if labels.numel() else ""
    return f"{tuple(labels.shape)} of {kind}{ends}"

"""Whether predictions are as often right as they are sure."""

import torch
from torch import Tensor

_BINS = 15


def calibration(confidence: Tensor, is_right: Tensor) -> list[dict[str, float]]:
    """Of n predictions, each with the probability it gives to its class (n,) and whether it is
    right (n,): in 15 bins of equal width by this probability, but for empty ones, the mean of this
    `confidence`, the `accuracy`, and how many `examples`."""
    confidence, is_right = confidence.double(), is_right.double()
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    sums = torch.zeros(3, _BINS, dtype=torch.double, device=confidence.device)
    sums.index_add_(1, bins, torch.stack([confidence, is_right, torch.ones_like(confidence)]))
    return [
        {"confidence": sure / number, "accuracy": right / number, "examples": int(number)}
        for sure, right, number in sums.T.tolist()
        if number
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """The expected calibration error of n predictions in bins b,

        sum_b n_b/n |accuracy_b - confidence_b|

    (Guo et al., ICML 2017, arXiv 1706.04599)."""
    gaps = (b["examples"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    return sum(gaps) / sum(b["examples"] for b in bins)

"""How well images are told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """How well images are told apart."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    mean_per_class: float
    """Top-1 accuracy, averaged over classes."""
    chance: float
    majority: float
    """What always naming the most frequent class gives."""
    classes: int
    images: int
    stderr: float
    """Binomial, of top1."""
    per_class: dict[str, "OfClass"]
    """Of each class with images."""


@dataclass(frozen=True)
class OfClass:
    """How many images a class has, and how many of these are classified right."""

    images: int
    accuracy: float


def classification(
    predicted: Tensor, target: Tensor, classes: Sequence[str], top5: Tensor | None = None
) -> Classification:
    """Of n images: the predicted class of each (n,), -1 for none, against its class (n,).

    Args:
        top5: whether the right one is among the five that score best (n,).
    """
    right = (predicted == target).double()
    n, p = len(right), right.mean().item()
    counts = torch.bincount(target, minlength=len(classes))
    shares = torch.zeros(len(classes), dtype=torch.double).index_add(0, target, right) / counts
    return Classification(
        top1=p,
        top5=None if top5 is None else top5.double().mean().item(),
        mean_per_class=shares[counts > 0].mean().item(),
        chance=1 / len(classes),
        majority=counts.max().item() / n,
        classes=len(classes),
        images=n,
        stderr=(p * (1 - p) / n) ** 0.5,
        per_class={
            label: OfClass(int(counts[index]), shares[index].item())
            for index, label in enumerate(classes)
            if counts[index]
        },
    )


def linear_probe(
    features: Tensor,
    target: Tensor,
    test_features: Tensor,
    test_target: Tensor,
    classes: Sequence[str],
    *,
    C: float = 1.0,
) -> Classification:
    """Accuracy of logistic regression on features that are standardised, as linear probes of masked
    autoencoders are (arXiv 2111.06377, A.1).

    Args:
        features: (m, D), with the classes `target` (m,): what it is fitted on.
        test_features: (n, D), with `test_target` (n,).
        C: scikit-learn's.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    probe.fit(features.numpy(), target.numpy())
    predicted = torch.from_numpy(probe.predict(test_features.numpy()))
    return classification(predicted, test_target, classes)

"""Figures of a classifier against scikit-learn's and by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss
from transformers import EvalPrediction

from nso_hf.tasks.classification.evaluation import (
    compute_metrics,
    figures,
    memorised,
    with_peak,
)


def random(n=200, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(0, classes, (n,), generator=generator)


def test_figures_are_those_of_scikit_learn():
    logits, labels = random()
    found = figures(logits, labels)
    probabilities = logits.double().softmax(dim=1).numpy()
    predicted = probabilities.argmax(axis=1)
    # Both in float64: 200 terms of order 1 are summed to some 1e-14.
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found["loss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-12)
    balanced = balanced_accuracy_score(labels, predicted)
    assert found["mean_per_class"] == pytest.approx(balanced, abs=1e-12)
    losses = -np.log(probabilities[np.arange(200), labels.numpy()])
    assert found["loss_stderr"] == pytest.approx(losses.std(ddof=1) / math.sqrt(200), abs=1e-12)
    p = found["accuracy"]
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 200))
    metrics = compute_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    assert metrics == {"accuracy": p}


def test_calibration_by_hand():
    """Probabilities .9, .9, .9 of which two are right, and .6, .58 of which one is."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6, 0.58], dtype=torch.double)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    found = figures(logits, torch.tensor([0, 0, 1, 0, 1]))
    # .9 is in (13/15, 14/15], .6 and .58 in (8/15, 9/15].
    (low, high) = found["calibration"]
    assert low == pytest.approx({"confidence": 0.59, "accuracy": 0.5, "examples": 2})
    assert high == pytest.approx({"confidence": 0.9, "accuracy": 2 / 3, "examples": 3})
    assert found["ece"] == pytest.approx((2 * 0.09 + 3 * (0.9 - 2 / 3)) / 5)


def test_calibration_over_all_bins():
    """Against a loop over the bins' edges."""
    logits, labels = random()
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = (x.numpy() for x in probabilities.max(dim=1))
    right, edges = predicted == labels.numpy(), np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    found = figures(logits, labels)
    assert found["ece"] == pytest.approx(expected, abs=1e-12)
    assert sum(b["examples"] for b in found["calibration"]) == found["examples"] == 200


def test_certain_and_single_examples():
    found = figures(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))
    assert (found["accuracy"], found["loss"], found["ece"]) == (1, 0, 0)
    assert found["loss_stderr"] == found["accuracy_stderr"] == 0


def test_what_is_memorised():
    logits = torch.eye(3)[[0, 0, 1, 2]]
    found = memorised(logits, torch.tensor([0, 0, 2, 0]), torch.tensor([1, 2, 1, 1]))
    assert (found["memorised"], found["accuracy"], found["examples"]) == (0.5, 0.25, 4)
    assert found["memorised_stderr"] == 0.25  # sqrt(.5 * .5 / 4)


def test_the_peak_is_the_best_evaluation():
    log = [{"step": 2, "eval_accuracy": 0.5}, {"step": 4, "loss": 1.0}]
    log += [{"step": step, "eval_accuracy": 0.8} for step in (4, 6)]
    for accuracy, expected in ((0.7, (0.8, 4)), (0.8, (0.8, 4)), (0.9, (0.9, 6))):
        found = with_peak({"accuracy": accuracy}, log, 6)
        assert (found["peak_accuracy"], found["peak_step"]) == expected
        assert found["accuracy"] == accuracy
    assert with_peak({"accuracy": 0.1}, [], 3)["peak_step"] == 3

"""How well a classifier does, how well it knows how well it does, and what wrong it remembers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import EvalPrediction, Trainer

from nso_hf.running.calibration import calibration, calibration_error
from nso_hf.tasks.classification.splitting import Splits

METRICS = ("loss", "accuracy")
"""What is logged of each evaluation, behind eval_."""


def figures(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of n examples by their logits (n, classes) and labels (n,): `accuracy` with its binomial
    standard error, `mean_per_class` (accuracy, averaged over the classes that occur), `loss` (mean
    negative log-likelihood, nats) with its standard error, `calibration` and the error of it,
    `ece`."""
    logits, n = logits.double(), len(labels)
    right = (logits.argmax(dim=1) == labels).double()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    per_class = [right[labels == label].mean() for label in labels.unique()]
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    bins = calibration(confidence, predicted == labels)
    return {
        "accuracy": right.mean().item(),
        "accuracy_stderr": _binomial(right),
        "mean_per_class": torch.stack(per_class).mean().item(),
        "loss": losses.mean().item(),
        "loss_stderr": losses.std(correction=min(1, n - 1)).item() / n**0.5,
        "ece": calibration_error(bins),
        "examples": n,
        "calibration": bins,
    }


def memorised(logits: Tensor, given: Tensor, true: Tensor) -> dict[str, float]:
    """Of n examples whose `given` labels (n,) are wrong: the share `memorised`, for which these are
    predicted, and the `accuracy`, for which the `true` ones (n,) are."""
    predicted = logits.argmax(dim=1)
    learned, right = (predicted == given).double(), (predicted == true).double()
    return {
        "memorised": learned.mean().item(),
        "memorised_stderr": _binomial(learned),
        "accuracy": right.mean().item(),
        "accuracy_stderr": _binomial(right),
        "examples": len(given),
    }


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For a `Trainer`, whose own is the loss."""
    logits, labels = map(torch.as_tensor, (prediction.predictions, prediction.label_ids))
    return {"accuracy": (logits.argmax(dim=-1) == labels).double().mean().item()}


def logits_alone(outputs: Any, labels: Any) -> Any:
    """For a `Trainer`, as `preprocess_logits_for_metrics`: without what a model returns beside."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def predicted(trainer: Trainer, examples: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,), in all processes."""
    found = trainer.predict(examples)
    return torch.as_tensor(found.predictions).float(), torch.as_tensor(found.label_ids)


def with_peak(
    found: Mapping[str, Any], log: Sequence[Mapping[str, Any]], step: int
) -> dict[str, Any]:
    """The figures on the validation examples after training, which ended with `step`, with the best
    accuracy of all evaluations (`peak_accuracy`, first at `peak_step`)."""
    logged = [(e["eval_accuracy"], e["step"]) for e in log if "eval_accuracy" in e]
    accuracy, at = max([*logged, (found["accuracy"], step)], key=lambda pair: (pair[0], -pair[1]))
    return {**found, "peak_accuracy": accuracy, "peak_step": at}


def judged(
    trainer: Trainer,
    splits: Splits,
    *,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    test: Dataset[Any] | None,
) -> dict[str, Any]:
    """What results.json has on the classifier after training: `validation`, `memorised` where there
    are wrong labels, and `test`; not what there are no examples for.

    Args:
        train: the training examples of `splits`, not augmented.
    """
    found: dict[str, Any] = {}
    if validation is not None:
        state = trainer.state
        figured = figures(*predicted(trainer, validation))
        found["validation"] = with_peak(figured, state.log_history, state.global_step)
    if wrong := splits.wrong:
        logits, _ = predicted(trainer, Subset(train, wrong))
        found["memorised"] = memorised(logits, splits.labels[wrong], splits.true_labels[wrong])
    if test is not None:
        found["test"] = figures(*predicted(trainer, test))
    return found


def _binomial(right: Tensor) -> float:
    p: float = right.mean().item()
    return math.sqrt(p * (1 - p) / len(right))

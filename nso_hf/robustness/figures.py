"""How well a model does on batches: loss, accuracy and calibration, with standard errors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nso_hf.running.calibration import calibration, calibration_error
from nso_hf.running.paired import error_of_sums, mean_of_sums

Batch = Mapping[str, Any]
_AT_ONCE = 2**24  # logits made float32
_TOLERANCE = 1e-2  # relative, between a loss in bfloat16 and the same one computed wider


@dataclass(frozen=True)
class Figures:
    """Of one example after another: how many predictions it has, their loss, and how many are
    right; of each prediction, confidence and whether it is right."""

    counts: Tensor
    losses: Tensor
    """Sums over an example's predictions; means over a batch, where that is all there is."""
    right: Tensor | None
    confidence: Tensor | None
    is_right: Tensor | None

    @property
    def loss(self) -> float:
        return mean_of_sums(self.losses, self.counts)

    @property
    def loss_stderr(self) -> float:
        return error_of_sums(self.losses, self.counts)

    @property
    def accuracy(self) -> float | None:
        return None if self.right is None else mean_of_sums(self.right, self.counts)

    @property
    def accuracy_stderr(self) -> float | None:
        return None if self.right is None else error_of_sums(self.right, self.counts)

    @property
    def ece(self) -> float | None:
        if self.confidence is None or self.is_right is None:
            return None
        if self.confidence.isnan().any():  # of weights that changed too much
            return math.nan
        return calibration_error(calibration(self.confidence, self.is_right))


@torch.no_grad()
def figures(model: nn.Module, batches: Iterable[Batch]) -> Figures:
    """Those of `model(**batch)` in evaluation mode. Where the loss is the cross-entropy of the
    logits, as that of classifiers and language models is, examples are told apart; else batches
    are, weighted by their examples."""
    device = next(model.parameters()).device
    parts = [_of_batch(model, _moved(batch, device)) for batch in batches]
    kinds = {part.right is None for part in parts}
    if len(kinds) > 1:  # one batch was no cross-entropy: none is
        parts = [
            Figures(p.counts.sum()[None], p.losses.sum()[None], None, None, None) for p in parts
        ]

    def joined(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors).double().cpu()

    return Figures(*(joined(name) for name in Figures.__dataclass_fields__))


def _means_alone(part: Figures) -> Figures:
    count = torch.tensor([float(len(part.counts))], device=part.losses.device)
    return Figures(count, count * part.loss, None, None, None)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _of_batch(model: nn.Module, batch: Batch) -> Figures:
    outputs = model(**batch)
    found_by_name = outputs if isinstance(outputs, Mapping) else vars(outputs)
    loss, logits, labels = found_by_name["loss"], found_by_name.get("logits"), batch.get("labels")
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        readings = [found for read in _READINGS if (found := read(logits, labels)) is not None]
        found = min(readings, key=lambda each: _gap(each.loss, loss.item()), default=None)
        if found is not None and _gap(found.loss, loss.item()) < _TOLERANCE:
            return found
    size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
    count = torch.tensor([float(size)], device=loss.device)
    return Figures(count, count * loss, None, None, None)


def _gap(one: float, other: float) -> float:
    """Between two losses, relative."""
    if not (math.isfinite(one) and math.isfinite(other)):  # of weights that changed too much
        return math.inf if math.isfinite(one) or math.isfinite(other) else 0.0
    return abs(one - other) / max(abs(other), 1e-2)


def _classes(logits: Tensor, labels: Tensor) -> Figures | None:
    """A class for each example."""
    if logits.ndim != 2 or labels.ndim != 1 or not _are_classes(labels):
        return None
    return _cross_entropy(logits[:, None], labels[:, None])


def _next_tokens(logits: Tensor, labels: Tensor) -> Figures | None:
    """The token after each, of a language model that only decodes."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or not _are_classes(labels):
        return None
    return _cross_entropy(logits[:, :-1], labels[:, 1:])


def _tokens(logits: Tensor, labels: Tensor) -> Figures | None:
    """A token or a class at each place, of encoder-decoders and taggers."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or not _are_classes(labels):
        return None
    return _cross_entropy(logits, labels)


_READINGS: Sequence[Callable[[Tensor, Tensor], Figures | None]] = (_classes, _next_tokens, _tokens)


def _are_classes(labels: Tensor) -> bool:
    return not labels.is_floating_point() and labels.dtype != torch.bool


def _cross_entropy(logits: Tensor, labels: Tensor) -> Figures:
    """Of logits (examples, places, classes) and labels (examples, places), -100 where none is."""
    some = max(1, _AT_ONCE // logits[0].numel())
    parts = [
        _cross_entropy_at_once(*each)
        for each in zip(logits.split(some), labels.split(some), strict=True)
    ]
    return Figures(*(torch.cat([p[i] for p in parts]).double() for i in range(5)))


def _cross_entropy_at_once(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    has_label, logits = labels != -100, logits.float()
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    most, predicted = logits.softmax(dim=-1).max(dim=-1)
    is_right = (predicted == labels) & has_label
    counts, right = has_label.sum(dim=1), is_right.sum(dim=1)
    return counts, losses.sum(dim=1), right, most[has_label], is_right[has_label]

r"""The loss along random directions in weight space, filter by filter as large as the weights.

f(W + a d) or f(W + a d + b e), where each filter (row) of the direction has the norm of that of W,
and weights of fewer than two dimensions stay (Li et al., NeurIPS 2018). That makes slices of models
comparable whose weights differ in scale.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from nso_hf.backends import Weight
from nso_hf.curvature.batches import Batch
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.trace import check_count
from nso_hf.refusal import refusal


@dataclass(frozen=True, kw_only=True)
class LossSlice(Measurement):
    """The loss on a line or a grid around the weights."""

    coordinates: tuple[float, ...]
    """Of the points on each axis; 1 moves every filter by its norm."""
    losses: Tensor = field(repr=False)
    """float64 [points], or [points, points]: first axis d, second axis e."""


def loss_slice(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    num_axes: int = 1,
    num_points: int = 21,
    extent: float = 0.5,
    params: Selection = "trainable",
    seed: int = 0,
) -> LossSlice:
    """The mean loss over `batches` at `num_points` (odd, so that W is one) points of each axis from
    -extent to extent.

    Raises:
        ValueError: an option is refused, or the weights are sharded.
    """
    check_count("num_points", num_points, low=3)
    if num_axes not in (1, 2):
        raise refusal("num_axes", num_axes, "must be 1 or 2", "Choose a line or a plane")
    if not 0 < extent < math.inf:
        raise refusal("extent", extent, "must be a positive number", "Typical: 0.5")
    if num_points % 2 == 0:
        cure = f"Use {num_points + 1}"
        raise refusal("num_points", num_points, "must be odd, for W to be among them", cure)
    watch, objective = Stopwatch(), Objective(model, batches, params)
    if not objective.backend.differentiates_twice:
        rule = "the norm of a filter needs whole weights"
        raise refusal("backend", objective.backend.name, rule, "Slice a checkpoint in one process")
    half = num_points // 2
    axis = [extent * (place - half) / half for place in range(num_points)]
    directions = [_filter_normalised(objective, seed, number) for number in range(num_axes)]
    losses = torch.zeros(num_points**num_axes, dtype=torch.float64)
    with objective.opened() as perturbation, objective.progress("Slice", len(losses)) as bar:
        for number in range(len(losses)):
            places = divmod(number, num_points) if num_axes == 2 else (number,)
            steps = [axis[place] for place in places]
            perturbation.move_to(_Combination(directions, steps) if any(steps) else None)
            losses[number] = objective.losses().sum()
            bar.update()
    return LossSlice(
        coordinates=tuple(axis),
        losses=losses.view([num_points] * num_axes),
        notes=objective.notes,
        **watch.fields(objective),
    )


def _filter_normalised(objective: Objective, seed: int, number: int) -> list[Tensor]:
    vectors, modules = objective.vectors, objective.backend.module.modules()
    transposed = {id(module.weight) for module in modules if isinstance(module, Conv1D)}
    directions = vectors.split(vectors.draw(seed, number, "normal"))
    for weight, direction in zip(objective.weights, directions, strict=True):
        if direction.ndim < 2:
            direction.zero_()
        else:
            rows, own = direction.flatten(1), weight.data.flatten(1)
            if id(weight.parameter) in transposed:  # inputs first
                rows, own = rows.T, own.T
            norms = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
            rows *= (own.norm(dim=1) / norms).unsqueeze(1)
    return directions


class _Combination:
    """The displacement sum_i steps_i directions_i."""

    def __init__(self, directions: Sequence[list[Tensor]], steps: Sequence[float]) -> None:
        self._directions, self._steps = directions, steps

    def add_to(self, weights: Sequence[Weight]) -> None:
        for direction, step in zip(self._directions, self._steps, strict=True):
            for weight, part in zip(weights, direction, strict=True):
                weight.data.add_(part, alpha=step)

"""Regularisation by the distance to the weights that training begins with, W_0."""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from nso_hf.backends import Weight
from nso_hf.refusal import check_positive, check_range, refusal
from nso_hf.step.companion import Companion, check_steps_on_weights
from nso_hf.step.states import States

ByPattern = float | Mapping[str, float]


class _FromTheStart(Companion):
    """Keeps W_0, one copy of the trainable weights, in checkpoints too."""

    def __init__(self, name: str, option: str, value: ByPattern) -> None:
        super().__init__(name)
        self._option = option
        self._values = dict(value) if isinstance(value, Mapping) else {"": value}
        for pattern, number in self._values.items():
            self._check_number(number)
            try:
                re.compile(pattern)
            except re.error as error:
                rule = f"{pattern!r} is not a regular expression ({error})"
                raise refusal(option, value, rule, "Escape special characters") from error
        self._first = States()

    @abstractmethod
    def _check_number(self, value: float) -> None: ...

    def check(self, trainer: Any) -> None:
        backend, weights = trainer.nso_weights()
        backend.check_steps_on_weights(self._option, dict(self._values))
        trainable = [weight.name for weight in weights if weight.parameter.requires_grad]
        for pattern in self._values:
            if not any(re.search(pattern, name) for name in trainable):
                cure = f"Use part of a parameter's name, such as {', '.join(trainable[:3])}"
                raise refusal(self._option, pattern, "matches no trainable parameter", cure)

    def join(self, trainer: Any) -> None:
        super().join(trainer)
        self._first = States()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first.load_state_dict(state["first"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _, weights = self.held()
        if "first" not in self._first:
            torch._foreach_copy_(self._start_of(weights), [weight.data for weight in weights])

    def _start_of(self, weights: Sequence[Weight]) -> list[Tensor]:
        return self._first.get("first", weights).parts

    def _pattern_of(self, weight: Weight) -> re.Match[str] | None:
        """The first pattern that is found in its name."""
        matches = (re.search(pattern, weight.name) for pattern in self._values)
        return next((match for match in matches if match), None)


class DistancePenalty(_FromTheStart):
    r"""Adds strength/2 ||W - W_0||^2 to the loss of every step, over the trainable weights (L2-SP:
    Li, Grandvalet, Davoine; ICML 2018, arXiv 1802.01483).

    Its gradient, strength (W - W_0), is added once a step at W, before clipping; the logged loss is
    without it. For two-sided NSO that is the gradient of the penalty at W + U and W - U, too; an
    ascent of the SAM family is that of the loss alone.

    Args:
        strength: >= 0; or regular expressions with one each. A weight takes that of the first found
            in its name, and is free where there is none: `{"classifier": 0, "": 0.01}`.
    """

    def __init__(self, strength: ByPattern) -> None:
        super().__init__("distance_penalty", "strength", strength)

    def _check_number(self, value: float) -> None:
        check_range("strength", value, 0, math.inf, "Typical values are 0.001 to 0.1")

    def add_to_gradient(self, loss_scale: float | Tensor) -> None:
        backend, weights = self.held()
        start = self._start_of(weights)
        gradients = backend.gradients(weights)
        for weight, first, gradient in zip(weights, start, gradients, strict=True):
            match = self._pattern_of(weight)
            strength = self._values[match.re.pattern] if match else 0.0
            if strength:
                gradient.add_((weight.data - first) * (strength * loss_scale))


class DistanceProjection(_FromTheStart):
    r"""Keeps ||W - W_0|| <= radius, in the Euclidean norm: after each optimizer step that leads out
    of the ball, W = W_0 + radius (W - W_0)/||W - W_0|| (Li, Zhang; NeurIPS 2021, arXiv 2111.04578).

    Args:
        radius: > 0, of one ball for all trainable weights; or regular expressions with one each. A
            weight belongs to the first found in its name, and is free where there is none; weights
            in which it finds the same text share a ball. `{r"layers\.\d+": 0.5}` is a ball for each
            layer, `{".*": 0.5}` one for each weight.
    """

    def __init__(self, radius: ByPattern) -> None:
        super().__init__("distance_projection", "radius", radius)

    def _check_number(self, value: float) -> None:
        check_positive("radius", value, "Typical values are 0.1 to 10")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_steps_on_weights(type(self).__name__, self.trainer.optimizer)
        super().on_train_begin(args, state, control, **kwargs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        backend, weights = self.held()
        balls: dict[tuple[str, str], list[tuple[Weight, Tensor]]] = {}
        for weight, first in zip(weights, self._start_of(weights), strict=True):
            if match := self._pattern_of(weight):
                balls.setdefault((match.re.pattern, match[0]), []).append((weight, first))
        device = weights[0].data.device
        squares = [
            torch.stack([_square(*each).to(device) for each in ball]).sum()
            for ball in balls.values()
        ]
        distances = backend.total(torch.stack(squares)).sqrt().tolist()  # one wait
        for ((pattern, _), ball), distance in zip(balls.items(), distances, strict=True):
            if distance > self._values[pattern]:
                for weight, first in ball:
                    share = self._values[pattern] / distance
                    weight.data.sub_(first).mul_(share).add_(first)


def _square(weight: Weight, first: Tensor) -> Tensor:
    difference = (weight.data - first).float()
    return difference.square().sum() / weight.copies

"""What is measured in a step, on its way to the Trainer's log."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor
from transformers.utils import logging

from nso_hf.backends import Weight
from nso_hf.step.perturbation import Perturbation

logger = logging.get_logger(__name__)

NORM = "nso/perturbation_norm"
RISE = "nso/rise"


class Measurements:
    """Those of the first step since the last log."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._values: dict[str, float | Tensor] = {}

    def wanted_of(self, step: int) -> bool:
        """Whether those of this step are going to be logged."""
        return self._step in (None, step)

    def begin(self, step: int) -> None:
        """Before a step: forget an attempt at it that failed, or an earlier training."""
        if self._step is not None and self._step >= step:
            self._forget()

    def lacks(self, name: str) -> bool:
        return name not in self._values

    def keep(self, values: dict[str, float | Tensor], step: int) -> None:
        """Of one micro-batch: its loss is its share of the step's, so that tensors, which are made
        of losses, add up."""
        for name, value in values.items():
            self._step = step
            earlier = self._values.get(name)
            self._values[name] = earlier + value if isinstance(earlier, Tensor) else value

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Make numbers of them; `mean` is that over processes. Of a tensor of two, the first over
        the second."""
        for name, value in self._values.items():
            if isinstance(value, Tensor):
                numerator, *denominator = mean(value).view(-1).tolist()
                self._values[name] = numerator / denominator[0] if denominator else numerator

    def move_into(self, logs: dict[str, float], mean: Callable[[Tensor], Tensor]) -> None:
        """Log them, settled."""
        self.settle(mean)
        logs |= cast("dict[str, float]", self._values)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Of settled ones."""
        return {"step": self._step, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._values = state["step"], state["values"]

    def _forget(self) -> None:
        self._values, self._step = {}, None


def norm_of(perturbation: Perturbation, weights: Sequence[Weight]) -> float:
    """The norm of the displacement as applied to all weights; with a warning where half precision
    has lost most of it."""
    norm, moved = perturbation.measure()
    if moved < 0.5 and any(weight.data.element_size() < 4 for weight in weights):
        dtypes = sorted({str(w.data.dtype).removeprefix("torch.") for w in weights})
        logger.warning_once(
            f"Only {moved:.0%} of the perturbed weights changed: {' and '.join(dtypes)} cannot "
            "carry noise as small as sigma. Load the model in float32 (with bf16=True for "
            "mixed precision), or raise sigma."
        )
    return norm

"""What every measurement says about itself."""

import time
from dataclasses import dataclass
from typing import Any

from nso_hf.curvature.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How a number was measured."""

    num_parameters: int
    """Weights that were selected."""
    num_batches: int
    num_examples: int
    seconds: float
    hvp: str | None = None
    """How products with the Hessian were computed, if any were: "autograd", "finite_difference"."""
    notes: tuple[str, ...] = ()
    """What was chosen, and why."""


class Stopwatch:
    """From its making on; with an objective, the fields of a `Measurement`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def fields(self, objective: Objective) -> dict[str, Any]:
        return {
            "num_parameters": objective.vectors.dimension,
            "num_batches": objective.num_batches,
            "num_examples": objective.num_examples,
            "seconds": time.perf_counter() - self._started,
        }

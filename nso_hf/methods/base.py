"""What a method is: at which points the gradient is evaluated, and with what weights the gradients
are added."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from nso_hf.backends import Weight
from nso_hf.methods.options import NoOptions, SharedOptions
from nso_hf.step.perturbation import Displacement


@dataclass(frozen=True)
class Point:
    """One evaluation: the loss at W + `sign` U, whose gradient is added `weight` times.

    At weight 0 there is no backward pass. `last` marks the final evaluation of a micro-batch: in
    its backward pass the gradients are reduced between replicas, and of all evaluations it alone
    updates what a forward pass leaves behind (random state, batch-norm statistics).
    """

    displacement: Displacement | None = None
    sign: int = 1
    weight: float = 1.0
    last: bool = False


@dataclass(frozen=True)
class Step:
    """What a method may know of the micro-batch at hand."""

    seed: int
    number: int
    """Optimizer steps taken before this one."""
    progress: float
    """The share of training that is over when this step is, in (0, 1]."""
    micro_batch: int
    """Number of this micro-batch among those of this optimizer step on all copies of the weights;
    processes that share one copy between them share the number."""
    weights: Sequence[Weight]
    """The perturbed weights."""
    is_measured: bool
    """Whether this step's measurements are going to be logged."""
    measurements: dict[str, float | Tensor] = field(default_factory=dict)
    """Filled by the method: name -> value, a tensor's values being added over micro-batches, then
    averaged over replicas."""


class Method(ABC):
    """An update rule over the evaluation points of one micro-batch."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """The fields of `SharedOptions` that it reads, beyond `common_random_numbers`."""
    Options: ClassVar[type[Any]] = NoOptions
    """Its own options, a frozen dataclass that `method_kwargs` fills and that checks itself."""

    def __init__(self, args: SharedOptions, options: Any) -> None:
        self.args = args
        self.options = options

    def check(self) -> None:  # noqa: B027
        """Raise a `ValueError` for options that do not fit together."""

    def check_micro_batches(self, accumulation: int, copies: int) -> None:  # noqa: B027
        """Raise a `ValueError` where an optimizer step has a number of micro-batches, accumulation
        steps x copies of the weights, that the method cannot use."""

    def displaces(self) -> bool:
        """Whether it ever moves the weights: if not, training is plain."""
        return True

    @abstractmethod
    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        """Yield each point, be sent its loss (a scalar), and return the loss to report for the
        micro-batch."""

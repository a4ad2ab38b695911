"""What a method is: at which points the gradient is evaluated, and with what weights the gradients
are added."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nso_hf.backends import Backend, Weight
from nso_hf.methods.options import Options, SharedOptions
from nso_hf.step.direction import Direction
from nso_hf.step.noise import Noise
from nso_hf.step.perturbation import Displacement
from nso_hf.step.rows import RowFactors, row_rms
from nso_hf.step.selection import SelectionOptions, select_perturbed
from nso_hf.step.states import States


@dataclass(frozen=True)
class Point:
    """One evaluation: the loss at W + `sign` U, whose gradient is added `weight` times.

    At weight 0 there is no backward pass, unless the gradient goes `into` a direction as well: the
    gradient of this micro-batch's mean loss alone, unscaled. `last` marks the final evaluation of a
    micro-batch: in its backward pass the gradients are reduced between replicas, and of all
    evaluations it alone updates what a forward pass leaves behind (random state, batch-norm
    statistics). A `forward_only` evaluation is in evaluation mode and keeps no activations.
    """

    displacement: Displacement | None = None
    sign: int = 1
    weight: float | Callable[[], float] = 1.0
    """Or what gives it once the gradient is there, which goes `into` a direction."""
    last: bool = False
    into: Direction | None = None
    forward_only: bool = False
    penalty: Callable[[Tensor], Tensor] | None = None
    """Of the loss, with its graph, as it is going to be differentiated: what is added to it."""


@dataclass(frozen=True)
class Step:
    """What a method may know of the micro-batch at hand."""

    seed: int
    number: int
    """Optimizer steps taken before this one."""
    sigma: float
    """The option, or what was found for it."""
    acts: bool
    """Whether the method is used in this step: see `start` and `interval`."""
    progress: float
    """The share of training that is over when this step is, in (0, 1]."""
    micro_batches: int
    """Micro-batches of this optimizer step in this process."""
    micro_batch: int
    """Number of this micro-batch among those of this optimizer step on all copies of the weights;
    processes that share one copy between them share the number."""
    weights: Sequence[Weight]
    """The perturbed weights."""
    all_weights: Sequence[Weight]
    """Every weight of the model, and what is trained beside it."""
    model: nn.Module
    """As its author wrote it: not wrapped."""
    is_measured: bool
    """Whether this step's measurements are going to be logged."""
    backend: Backend
    states: States
    """What the method remembers from step to step."""
    optimizer: Any
    loss_scale: float | Tensor
    """What half precision multiplies the gradients by."""
    measurements: dict[str, float | Tensor] = field(default_factory=dict)
    """Filled by the method: name -> value, a tensor's values being added over micro-batches, then
    averaged over replicas."""

    def remembered(self, name: str, first: float = 0.0) -> Direction:
        """What the method remembers under this name, to be read or written in place: every element
        is `first` at first."""
        return self.states.get(name, self.weights, first)

    def remember(self, name: str, a: float, new: Direction, b: float) -> None:
        """Let what is remembered be a times itself + b times `new`, but not in a step that half
        precision is going to skip."""
        remembered = self.remembered(name)
        if isinstance(self.loss_scale, float):
            remembered.combine_(a, new, b)
            return
        finite = self.norm(new).isfinite() & self.norm(self.gradient()).isfinite()
        earlier = [part.clone() for part in remembered.parts]
        remembered.combine_(a, new, b)
        for part, before in zip(remembered.parts, earlier, strict=True):
            part.copy_(torch.where(finite.to(part.device), part, before))

    def row_rms(self) -> RowFactors:
        """The root mean square of each row of the perturbed weights, at the W of this optimizer
        step."""
        if self.states.rms is None:
            self.states.rms = row_rms(self.weights, self.backend)
        return self.states.rms

    def collect(self, name: str, direction: Direction) -> None:
        """Add a direction of this micro-batch to those of the others of this step."""
        share = 1 / self.micro_batches
        if name not in self.states.sums:
            parts = torch._foreach_mul(direction.parts, share)
            self.states.sums[name] = Direction(list(parts), direction.scale)
        else:
            self.states.sums[name].combine_(1, direction, share)

    def collected(self, name: str) -> Direction:
        """The mean of what was collected, over all micro-batches of this step on all copies of the
        weights; for `finish`, once."""
        collected = self.states.sums.pop(name)
        self.backend.average_copies(collected.parts)
        return collected

    def gradient(self) -> Direction:
        """The gradient of this whole step, as the optimizer is going to see it before clipping: for
        `finish`."""
        return Direction(self.backend.gradients(self.weights), 1 / self.loss_scale)

    def first_moment(self) -> Direction:
        """The optimizer's moving average of the gradient, zero before its first step."""
        return Direction(self.backend.first_moments(self.optimizer, self.weights))

    def add_to_gradient(self, displacement: Noise) -> None:
        """Add a direction to the gradient of this step, without a backward pass. It has to be the
        same on all copies of the weights."""
        parts = self.backend.gradients(self.weights)
        scaled = replace(displacement, std=displacement.std * float(self.loss_scale))
        scaled.add_to([replace(w, data=g) for w, g in zip(self.weights, parts, strict=True)])

    def norm(self, direction: Direction) -> Tensor:
        """Its Euclidean norm over one copy of the perturbed weights, a scalar."""
        return direction.norm(self.weights, self.backend)


class Method(ABC):
    """An update rule over the evaluation points of one micro-batch."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """The fields of `SharedOptions` that it reads, beyond `common_random_numbers`."""
    reads_gradients: ClassVar[bool] = False
    """Whether it takes gradients, or the optimizer's averages of them, into its own hands."""
    remembers: ClassVar[bool] = False
    """Whether it remembers something from step to step."""
    Options: ClassVar[type[Any]] = Options
    """Its own options, a frozen dataclass that `method_kwargs` fills and that checks itself."""

    def __init__(self, args: SharedOptions, options: Any) -> None:
        self.args = args
        self.options = options

    def check(self) -> None:  # noqa: B027
        """Raise a `ValueError` for options that do not fit together."""

    def check_micro_batches(self, accumulation: int, copies: int) -> None:  # noqa: B027
        """Raise a `ValueError` where an optimizer step has a number of micro-batches, accumulation
        steps x copies of the weights, that the method cannot use."""

    def finish(self, step: Step) -> None:  # noqa: B027
        """After the last micro-batch of an optimizer step, a plain one too, when the gradients are
        reduced: what the method remembers of them, or changes about them."""

    def check_backend(self, backend: Backend) -> None:  # noqa: B027
        """Raise a `ValueError` for a way of running that the options do not go with."""

    def check_optimizer(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Raise a `ValueError` for an optimizer that does not go with the method."""

    def selected(
        self, weights: Sequence[Weight], model: nn.Module, args: SelectionOptions
    ) -> list[Weight]:
        """Those of all `weights` that it moves: the trainable ones that `args` selects."""
        return select_perturbed(weights, args)

    def displaces(self) -> bool:
        """Whether it ever moves the weights: if not, training is plain."""
        return True

    def acts(self, number: int, total: int) -> bool:
        """Whether it is used in step `number` of `total`, counted from 0."""
        first = math.ceil(self.args.start * total)
        return number >= first and (number - first) % self.args.interval == 0

    def evaluations(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        """The points of a step in which the method is used, or the only one of a plain step."""
        return self.points(step) if step.acts else _plain()

    def parks(self, weights: Sequence[Weight]) -> bool:
        """Whether the next micro-batch begins where the last evaluation of this one was, or at its
        mirror image, and that takes longer to make than to keep."""
        return False

    @abstractmethod
    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        """Yield each point, be sent its loss (a scalar), and return the loss to report for the
        micro-batch."""


def _plain() -> Generator[Point, Tensor, Tensor]:
    return (yield Point(last=True))

r"""Products of the Hessian H of an objective f with vectors, two ways.

    autograd             H v = d/dW [g(W)' v]                              Pearlmutter (1994)
    finite_difference    H v = [g(W + h v) - g(W - h v)] / (2 h)  + O(h^2)

The first is exact to rounding and needs whole weights and a forward pass that can be differentiated
twice. The second needs first derivatives alone, and runs wherever training does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import logging

from nso_hf.backends import Weight
from nso_hf.curvature.objective import Objective, graph_of
from nso_hf.refusal import refusal
from nso_hf.step.perturbation import Perturbation

logger = logging.get_logger(__name__)

HVPS = ("auto", "autograd", "finite_difference")

_TRIALS = 4  # of steps for one product
_AGREEMENT = 0.02  # relative, of two products; they differ by some 1e-3 where both are right
_UNSETTLED = (
    "differences of gradients depend on their step, as where ReLUs switch: use double backward, or "
    "take these figures for those of a loss smoothed over the step"
)


class Hessian(ABC):
    """The Hessian of an objective, while that is open."""

    hvp: ClassVar[str]
    error: float
    """Of a product, relative, about."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.notes = list(objective.notes)
        # Called after the product of each round.
        self.on_product: Callable[[], object] = lambda: None

    @abstractmethod
    def times(self, vector: Tensor) -> Tensor:
        """H v."""

    @abstractmethod
    def forms(self, vector_number: Callable[[int], Tensor], count: int) -> Tensor:
        """v' H_b v in float64 of shape [rounds, vectors, weights], summed over processes: of each
        of `count` vectors, and each weight's share in it."""


class Autograd(Hessian):
    """By double backward. The graph of a round's gradient is kept until that of another is needed:
    products with many vectors cost one backward pass each."""

    hvp = "autograd"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.error = 30 * max(torch.finfo(w.data.dtype).eps for w in objective.weights)
        self._round: int | None = None
        self._loss: Tensor | None = None
        self._gradient: list[Tensor] = []

    def times(self, vector: Tensor) -> Tensor:
        parts = self.objective.vectors.split(vector)
        total = torch.zeros_like(vector)
        for number in range(self.objective.num_rounds):
            total += self.objective.vectors.join(self.times_round(number, parts))
            self.on_product()
        return self.objective.backend.summed([total])[0]

    def forms(self, vector_number: Callable[[int], Tensor], count: int) -> Tensor:
        vectors, rounds = self.objective.vectors, []
        for number in range(self.objective.num_rounds):
            forms = []
            for i in range(count):
                parts = vectors.split(vector_number(i))
                forms.append(vectors.products(parts, self.times_round(number, parts)))
                self.on_product()
            rounds.append(torch.stack(forms))
        processes = self.objective.backend.num_processes
        # Each process has its own batches and all weights, of which `products` counts a share.
        return self._summed(torch.stack(rounds) * processes)

    def _summed(self, values: Tensor) -> Tensor:
        device = self.objective.vectors.device
        return self.objective.backend.summed([values.to(device)])[0].cpu()

    def times_round(self, number: int, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        parameters = [weight.parameter for weight in self.objective.weights]
        if self._round != number:
            self.forget()  # before the next is built
            # Of PyTorch's attention, the one that is made of operations with second derivatives.
            with sdpa_kernel(SDPBackend.MATH):
                loss = self.objective.differentiable_loss(number)
                gradient = torch.autograd.grad(
                    loss, parameters, create_graph=True, materialize_grads=True
                )
            self._round, self._loss, self._gradient = number, loss, list(gradient)
        depend = [i for i, g in enumerate(self._gradient) if g.requires_grad]
        if not depend:  # of a loss that is linear in the weights
            return [torch.zeros_like(part) for part in parts]
        return torch.autograd.grad(
            [self._gradient[i] for i in depend],
            parameters,
            [parts[i].to(self._gradient[i].dtype) for i in depend],
            retain_graph=True,
            materialize_grads=True,
        )

    def forget(self) -> None:
        """Free the graph."""
        self._round, self._loss, self._gradient = None, None, []

    def custom_functions(self) -> set[str]:
        """Names of functions in the last loss whose derivative somebody wrote in Python."""
        assert self._loss is not None
        return {
            type(node).__name__.removesuffix("Backward")
            for node in graph_of(self._loss)
            if isinstance(node, torch.autograd.function.BackwardCFunction)
        }


class FiniteDifference(Hessian):
    r"""By central differences of gradients, the weights moved as NSO moves them.

    The step h along a unit vector v is such that the gradient g changes by a small share of itself,

        h = rho |g| / |H v|,    rho = eps^(1/3),    eps the rounding error of float32,

    since that change is the scale on which curvature changes in sharp directions (truncation grows
    with h^2), and what rounding, about eps |g|, has to be small against (it grows with 1/h). Models
    of float64 have parts in float32 too.

    The gradient of a network of ReLUs jumps where one of them switches: its differences never
    settle, whatever h is. So one product is compared with that of another step.
    """

    hvp = "finite_difference"

    def __init__(self, objective: Objective, perturbation: Perturbation) -> None:
        super().__init__(objective)
        self._perturbation = perturbation
        vectors = objective.vectors
        self._rho: float = torch.finfo(torch.float32).eps ** (1 / 3)
        self.error = self._rho
        self.is_settled: bool | None = None  # not known yet
        weights = vectors.norm(vectors.copy_of_weights())
        self._longest: float = self._rho * max(weights, 0.01 * vectors.dimension**0.5)
        self._loss = abs(objective.losses().sum().item())
        gradients = map(vectors.join, map(self._gradient, range(objective.num_rounds)))
        self._slope = vectors.norm(reduce(Tensor.add_, gradients))
        self._step: float = 0.1 * self._longest

    def times(self, vector: Tensor) -> Tensor:
        norm = self.objective.vectors.norm(vector)
        product = self._times_unit(vector / norm) if norm > 0 else torch.zeros_like(vector)
        for _ in range(self.objective.num_rounds):
            self.on_product()
        return product.mul_(norm)

    def _times_unit(self, vector: Tensor) -> Tensor:
        """H v, |v| = 1, with a step that fits; the next product begins with it."""
        for _ in range(_TRIALS):
            h = self._step
            product = self._difference(vector, h).div_(2 * h)
            self._step = self._fitting(self.objective.vectors.norm(product))
            if self._step / 10 <= h <= 3 * self._step:
                break
        if self.is_settled is None:
            self._compare(vector, product, h)
        return product

    def _compare(self, vector: Tensor, product: Tensor, h: float) -> None:
        """Whether a step of half the length gives the same."""
        vectors = self.objective.vectors
        other = self._difference(vector, h / 2).div_(h)
        difference = vectors.norm(other.sub_(product))
        self.is_settled = difference <= _AGREEMENT * vectors.norm(product)
        if not self.is_settled:
            self.notes.append(_UNSETTLED)

    def _difference(self, vector: Tensor, h: float) -> Tensor:
        difference = torch.zeros_like(vector)
        for sign in self._both_signs(vector, h):
            for number in range(self.objective.num_rounds):
                gradient = self.objective.vectors.join(self._gradient(number))
                difference.add_(gradient, alpha=sign)
        return difference

    def _fitting(self, curvature: float) -> float:
        """The step for |H v| = `curvature`."""
        # At a minimum the gradient vanishes, but not what rounding leaves of it.
        slope = max(self._slope, 1e-3 * math.sqrt(self._loss * curvature))
        step = self._rho * slope / curvature if curvature > 0 else self._longest
        return min(max(step, 1e-5 * self._longest), self._longest)

    def forms(self, vector_number: Callable[[int], Tensor], count: int) -> Tensor:
        vectors, rounds = self.objective.vectors, self.objective.num_rounds
        forms = torch.zeros(rounds, count, len(self.objective.weights), dtype=torch.float64)
        for i in range(count):
            vector = vector_number(i)
            norm = vectors.norm(vector)
            if i == 0:
                self._times_unit(vector / norm)  # finds the step, for all: they are alike
            parts, h = vectors.split(vector), self._step / norm
            for sign in self._both_signs(vector, h):
                for number in range(rounds):
                    slope = vectors.products(parts, self._gradient(number))
                    forms[number, i] += sign * slope / (2 * h)
            for _ in range(rounds):
                self.on_product()
        return vectors.total(forms)

    def _both_signs(self, vector: Tensor, h: float) -> Iterator[int]:
        along = _Along(self.objective.vectors.split(vector), h)
        for sign in (1, -1):
            self._perturbation.move_to(along, sign)
            yield sign
        self._perturbation.restore()

    def _gradient(self, number: int) -> list[Tensor]:
        loss = self.objective.differentiable_loss(number)
        return self.objective.backend.gradient(loss, self.objective.weights)


class _Along:
    """The displacement h v."""

    def __init__(self, parts: Sequence[Tensor], h: float) -> None:
        self._parts, self._h = list(parts), h

    def add_to(self, weights: Sequence[Weight]) -> None:
        for weight, part in zip(weights, self._parts, strict=True):
            weight.data.add_(part, alpha=self._h)


@contextmanager
def hessian_of(
    objective: Objective, hvp: str, products: int | None, description: str
) -> Iterator[Hessian]:
    """The Hessian of an objective that is open inside, with a progress bar over `products` (None:
    nobody knows how many); its notes say what was chosen.

    Raises:
        ValueError: `hvp` is unknown or cannot be had for this model.
    """
    if hvp not in HVPS:
        raise refusal("hvp", hvp, "unknown", f"Choose one of {', '.join(map(repr, HVPS))}")
    total = None if products is None else products * objective.num_rounds
    with objective.opened() as perturbation, objective.progress(description, total) as bar:
        objective.check_gradient()
        hessian = _chosen(objective, hvp, perturbation)
        hessian.on_product = bar.update
        yield hessian
        if _UNSETTLED in hessian.notes:
            logger.warning(f"{_UNSETTLED[0].upper()}{_UNSETTLED[1:]}.")


def _chosen(objective: Objective, hvp: str, perturbation: Perturbation) -> Hessian:
    if hvp == "finite_difference":
        return FiniteDifference(objective, perturbation)
    twice = Autograd(objective)
    obstacle = _obstacle(twice, perturbation)
    if obstacle is None:
        return twice
    if hvp == "autograd":
        raise refusal("hvp", hvp, obstacle, "Use 'finite_difference' or 'auto'")
    twice.forget()
    hessian = FiniteDifference(objective, perturbation)
    hessian.notes.append(f"central differences of gradients: {obstacle}")
    return hessian


def _obstacle(hessian: Autograd, perturbation: Perturbation) -> str | None:
    """What stands in the way of differentiating twice, if anything does."""
    objective = hessian.objective
    if not objective.backend.differentiates_twice:
        return f"{objective.backend.name} shards the weights"
    try:
        hessian.times_round(0, [weight.data for weight in objective.weights])
    except RuntimeError as error:
        return f"no double backward ({str(error).splitlines()[0]})"
    custom = hessian.custom_functions()
    if custom:  # PyTorch's own functions raise where they have no second derivative; these need not
        vectors, names = objective.vectors, ", ".join(sorted(custom))
        v = vectors.draw(0, 0)
        differences = FiniteDifference(objective, perturbation)
        product = differences.times(v)
        if not differences.is_settled:
            hessian.notes.append(f"the second derivative of {names} could not be checked")
            return None
        off = vectors.split(hessian.times(v) - product)
        sizes = vectors.total(vectors.products(vectors.split(product), vectors.split(product)))
        errors = vectors.total(vectors.products(off, off))
        matter = sizes > 1e-6 * sizes.sum()  # weights with a part in the product
        if (errors[matter] > _AGREEMENT**2 * sizes[matter]).any():
            return f"no second derivative of {names}, by comparison"
    return None

"""Directions in the space of the perturbed weights: gradients, and what methods make of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from nso_hf.backends import Backend, Weight
from nso_hf.step.perturbation import Displacement


@dataclass(eq=False)
class Direction:
    """`scale` times one tensor for each perturbed weight, in the shape of its local `data`.

    It is a displacement. A new one is empty, for a pass to put its gradient `into`.
    """

    parts: list[Tensor] = field(default_factory=list)
    scale: float | Tensor = 1.0
    """A number, or a tensor of no dimensions."""

    @classmethod
    def of(cls, displacement: Displacement, weights: Sequence[Weight]) -> Self:
        """The tensors of another displacement: one more copy of the weights' size."""
        parts = [torch.zeros_like(weight.data) for weight in weights]
        displacement.add_to([replace(w, data=p) for w, p in zip(weights, parts, strict=True)])
        return cls(parts)

    def add_to(self, weights: Sequence[Weight]) -> None:
        """Add it to each local weight, in place."""
        for weight, part in zip(weights, self.parts, strict=True):
            weight.data.add_(part * _on(part, self.scale))

    def __mul__(self, factor: float | Tensor) -> "Direction":
        """This direction, times a number: another view of the same tensors."""
        return Direction(self.parts, self.scale * factor)

    def multiply_(self, factors: Sequence[Tensor]) -> Self:
        """Multiply element by element, in place."""
        torch._foreach_mul_(self.parts, list(factors))
        return self

    def combine_(self, a: float, other: "Direction", b: float) -> Self:
        """a times this + b times `other`, in place."""
        torch._foreach_mul_(self.parts, a)
        for mine, its in zip(self.parts, other.parts, strict=True):
            mine.add_(its * _on(its, other.scale * b))
        return self

    def norm(self, weights: Sequence[Weight], backend: Backend) -> Tensor:
        """The Euclidean norm over all perturbed weights of one copy of the model: a scalar."""
        norms = [
            torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
            for part in self.parts
        ]
        device = norms[0].device
        squares = [
            norm.to(device).square() / weight.copies
            for norm, weight in zip(norms, weights, strict=True)
        ]
        total = backend.total(torch.stack(squares).sum())
        norm: Tensor = total.sqrt().to(device) * abs(_on(norms[0], self.scale))
        return norm


def _on(tensor: Tensor, scale: float | Tensor) -> Any:
    return scale.to(tensor.device) if isinstance(scale, Tensor) else scale

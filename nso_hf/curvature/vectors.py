"""Vectors with one element for each measured weight, each process holding the elements of the
weights that it holds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from nso_hf.backends import Backend, Weight
from nso_hf.step.noise import Noise
from nso_hf.step.rows import RowFactors, RowNoise

_CHUNK = 2**18  # elements whose products are added in the type of the weights, then in float64


class Vectors:
    """The vector space of the `weights`. A vector is one flat tensor, in the order of the weights;
    of sums over it every process gets the whole."""

    def __init__(self, weights: Sequence[Weight], backend: Backend) -> None:
        self.weights = weights
        self._backend = backend
        self._sizes = [weight.data.numel() for weight in weights]
        self._copies = torch.tensor([weight.copies for weight in weights], dtype=torch.float64)
        self.dimension = sum(weight.numel for weight in weights)  # over all processes
        self.local_size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, (weight.data.dtype for weight in weights))
        self.device = weights[0].data.device

    def draw(
        self,
        seed: int,
        number: int,
        distribution: str = "rademacher",
        rows: RowFactors | None = None,
    ) -> Tensor:
        """Random vector `number`, of independent elements with mean 0 and variance 1, or times the
        numbers of their `rows`: the same whoever holds the weights."""
        vector = torch.zeros(self.local_size, dtype=self.dtype, device=self.device)
        parts = [
            replace(weight, data=part)
            for weight, part in zip(self.weights, self.split(vector), strict=True)
        ]
        drawn = (seed, number, 0, 1.0, distribution)
        (Noise(*drawn) if rows is None else RowNoise(*drawn, rows)).add_to(parts)
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of its parts, in the shapes of the weights' data."""
        return [
            part.view(weight.data.shape)
            for part, weight in zip(vector.split(self._sizes), self.weights, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1).to(self.dtype) for part in parts])

    def copy_of_weights(self) -> Tensor:
        return self.join([weight.data for weight in self.weights])

    def products(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """This process's share of the inner product of each weight's part: float64, one for each
        weight. `total` adds what several processes have."""
        sums = [
            torch.dot(x.to(self.dtype), y.to(self.dtype))
            for parts in zip(a, b, strict=True)
            for x, y in zip(*(part.reshape(-1).split(_CHUNK) for part in parts), strict=True)
        ]
        chunks = [max(1, math.ceil(size / _CHUNK)) for size in self._sizes]
        by_weight = torch.stack(sums).cpu().double().split(chunks)  # one wait for the device
        return torch.stack([part.sum() for part in by_weight]) / self._copies

    def total(self, values: Tensor) -> Tensor:
        """The sum over the parts of the model that the processes hold, on the CPU."""
        return self._backend.total(values).cpu()

    def dot(self, a: Tensor, b: Tensor) -> float:
        return self.total(self.products(self.split(a), self.split(b)).sum()).item()

    def norm(self, a: Tensor) -> float:
        return float(self.dot(a, a) ** 0.5)

    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        """The inner products of `vector` with the rows of `basis`: float64, on the CPU."""
        sizes, copies = self._sizes, self._copies
        if len(copies.unique()) == 1:  # then all weights count as one
            sizes, copies = [self.local_size], copies[:1]
        sums = torch.zeros(len(basis), dtype=torch.float64)
        for rows, part, count in zip(
            basis.split(sizes, dim=1), vector.split(sizes), copies, strict=True
        ):
            chunks = zip(rows.split(_CHUNK, dim=1), part.split(_CHUNK), strict=True)
            sums += torch.stack([x @ y for x, y in chunks]).cpu().double().sum(dim=0) / count
        return self.total(sums)

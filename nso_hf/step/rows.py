"""Rows of weights: slices along the first dimension, the filters of a convolution, the rows of an
embedding. A vector is one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nso_hf.backends import Backend, Weight
from nso_hf.step.noise import Noise


def row_length(shape: torch.Size) -> int:
    """Elements of a row of a tensor of this shape."""
    return shape[1:].numel() if len(shape) > 1 else shape.numel()


def row_norms(weights: Sequence[Weight], backend: Backend) -> list[Tensor]:
    """The Euclidean norms of the rows of each whole weight, in float32 at least: the same on every
    process that holds a part of it."""
    squares = [_squares(weight) / weight.copies for weight in weights]
    total = backend.total(torch.cat([each.to(squares[0].device) for each in squares]))
    parts = total.sqrt().split([each.numel() for each in squares])
    return [part.to(weight.data.device) for part, weight in zip(parts, weights, strict=True)]


def _squares(weight: Weight) -> Tensor:
    """Of each row of the whole weight, the sum of squares of what this process holds of it."""
    length = max(1, row_length(weight.shape))
    dtype = torch.promote_types(weight.data.dtype, torch.float32)
    sums = torch.zeros(weight.numel // length, dtype=dtype, device=weight.data.device)
    if weight.data.numel():
        first, before = divmod(weight.start, length)
        flat = weight.data.reshape(-1).to(dtype)
        after = -(before + flat.numel()) % length
        flat = pad(flat, (before, after)) if before or after else flat
        held = torch.linalg.vector_norm(flat.view(-1, length), dim=1).square()
        sums[first : first + len(held)] = held
    return sums


@dataclass(frozen=True, eq=False)
class RowNoise(Noise):
    """Noise in the units of each row: U of `Noise`, times a number for each row."""

    rows: Mapping[int, Tensor] | None = None
    """Weight's index -> one number for each of its rows."""
    columns: frozenset[int] = frozenset()
    """Indices of matrices that hold their rows as columns."""

    def factors(self, weight: Weight) -> tuple[Tensor, int]:
        assert self.rows is not None
        length = 1 if weight.index in self.columns else row_length(weight.shape)
        return self.rows[weight.index], length

    def scaled(self, noise: Tensor, weight: Weight, first: int) -> Tensor:
        rows, length = self.factors(weight)
        end = first + noise.numel()
        if weight.index in self.columns:
            places = torch.arange(first, end, device=noise.device) % len(rows)
            return noise * rows.to(noise.dtype)[places]
        above, below = first // length, (end - 1) // length + 1
        factors = rows[above:below].to(noise.dtype)
        if len(factors) == 1:
            return noise * factors
        spread = factors.repeat_interleave(length, output_size=len(factors) * length)
        return noise * spread[first - above * length : end - above * length]

"""Rows of weights: slices along the first dimension, the filters of a convolution, the rows of an
embedding. A vector is one row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nso_hf.backends import Backend, Weight
from nso_hf.step.noise import Noise

FLOOR = 0.1  # of the RMS of all weights: that of a row counts as no less
_CHUNK = 2**20  # elements whose squares are held at a time
_BITS = 16  # of an RMS: sums in another order, as where a row is split, round to the same


def row_length(shape: torch.Size) -> int:
    """Elements of a row of a tensor of this shape."""
    return shape[1:].numel() if len(shape) > 1 else shape.numel()


def row_norms(weights: Sequence[Weight], backend: Backend) -> list[Tensor]:
    """The Euclidean norms of the rows of each whole weight, in float64 where the device has it: the
    same on every process that holds a part of it."""
    squares = [_squares(weight) for weight in weights]
    if all(weight.copies == backend.num_processes for weight in weights):
        return [each.sqrt() for each in squares]  # every process has all of them
    shares = [each / weight.copies for each, weight in zip(squares, weights, strict=True)]
    total = backend.total(torch.cat([share.to(shares[0].device) for share in shares]))
    parts = total.sqrt().split([each.numel() for each in squares])
    return [part.to(weight.data.device) for part, weight in zip(parts, weights, strict=True)]


def _squares(weight: Weight) -> Tensor:
    """Of each row of the whole weight, the sum of squares of what this process holds of it."""
    length = max(1, row_length(weight.shape))
    flat = weight.data.reshape(-1)
    dtype = torch.float32 if flat.device.type == "mps" else torch.float64
    sums = torch.zeros(weight.numel // length, dtype=dtype, device=flat.device)
    first, before = divmod(weight.start, length)
    begun = min(flat.numel(), -before % length)  # the rest of a row that another process begins
    whole = (flat.numel() - begun) // length
    if begun:
        sums[first] = flat[:begun].to(dtype).square().sum()
        first += 1
    at_a_time = max(1, _CHUNK // length)
    rows = flat[begun : begun + whole * length].view(whole, length)
    for number, some in enumerate(rows.split(at_a_time) if whole else ()):
        place = first + number * at_a_time
        sums[place : place + len(some)] = some.to(dtype).square().sum(dim=1)
    if (rest := flat[begun + whole * length :]).numel():
        sums[first + whole] = rest.to(dtype).square().sum()
    return sums


class RowFactors(dict[int, Tensor]):
    """Weight's index -> one number for each of its rows. It is equal to itself alone."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]


def row_rms(weights: Sequence[Weight], backend: Backend) -> RowFactors:
    """The root mean square of each row, a tenth of that of all these weights together at least:
    rows of zeros, as LoRA's B begins with, have that one."""
    norms = row_norms(weights, backend)
    least = FLOOR * _overall(weights, norms)
    factors = RowFactors()
    for weight, norm in zip(weights, norms, strict=True):
        rms = norm / math.sqrt(max(1, row_length(weight.shape)))
        factors[weight.index] = _rounded(rms.clamp(min=least.to(rms.device)))
    return factors


def overall_rms(weights: Sequence[Weight], backend: Backend) -> Tensor:
    """The root mean square of all these weights together, a scalar."""
    return _overall(weights, row_norms(weights, backend))


def _overall(weights: Sequence[Weight], norms: Sequence[Tensor]) -> Tensor:
    squares = torch.stack([norm.square().sum().to(norms[0].device) for norm in norms])
    return (squares.sum() / sum(weight.numel for weight in weights)).sqrt()


def _rounded(values: Tensor) -> Tensor:
    """To a few bits, in float32."""
    digits = round(1 - math.log2(torch.finfo(values.dtype).eps))
    shifted = values * (2.0 ** (digits - _BITS) + 1)
    return (shifted - (shifted - values)).float()


@dataclass(frozen=True)
class RowNoise(Noise):
    """Noise in the units of each row: U of `Noise`, times a number for each row."""

    rows: RowFactors = field(default_factory=RowFactors)
    columns: frozenset[int] = frozenset()
    """Indices of matrices that hold their rows as columns."""

    def factors(self, weight: Weight) -> tuple[Tensor, int]:
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

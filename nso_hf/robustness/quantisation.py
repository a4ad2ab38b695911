"""Weights as a quantised model has them: rounded to the nearest of few values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nso_hf.refusal import refusal
from nso_hf.robustness.matrices import changed, wide


@contextmanager
def round_to_nearest(
    model: nn.Module, *, bits: int, group_size: int | None = None
) -> Iterator[None]:
    """Inside, the weights of linear and convolution layers are symmetrically quantised and
    dequantised; afterwards they are as before, bit for bit.

        w -> s round(w/s),    s = max |w| / (2^(bits-1) - 1)

    with the maximum over all inputs of an output (a row, a filter), or over groups of these.
    Biases, norms and embeddings stay, unless an embedding is tied to a linear layer.

    Args:
        bits: of a weight, 2 to 16; 2 leaves three values.
        group_size: consecutive inputs that share a scale; the last group of an output may be
            smaller. None: all of them.

    Raises:
        ValueError: `bits` or `group_size` is out of range, or there is no such layer.
    """
    check_bits(bits)
    check_group_size(group_size)
    levels = 2 ** (bits - 1) - 1
    with changed(model, lambda _, matrix: _quantised(matrix, levels, group_size)):
        yield


def check_bits(bits: int, option: str = "bits") -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise refusal(option, bits, "not a whole number from 2 to 16", "Use 8, 4, 3 or 2")


def check_group_size(size: int | None, option: str = "group_size") -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        cure = "Use 64, or None for one scale per output"
        raise refusal(option, size, "not a whole number above 0", cure)


def _quantised(matrix: Tensor, levels: int, group_size: int | None) -> Tensor:
    groups = wide(matrix).split(group_size or matrix.shape[1], dim=1)
    return torch.cat([_rounded(group, levels) for group in groups], dim=1)


def _rounded(group: Tensor, levels: int) -> Tensor:
    scale = group.abs().amax(dim=1, keepdim=True) / levels
    return torch.where(scale > 0, (group / scale).round() * scale, group)

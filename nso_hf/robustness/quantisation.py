"""Weights as a quantised model has them: rounded to the nearest of few values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nso_hf.refusal import refusal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise refusal("bits", bits, "not a whole number from 2 to 16", "Use 8, 4, 3 or 2")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        cure = "Use 64, or None for one scale per output"
        raise refusal("group_size", group_size, "not a whole number above 0", cure)
    matrices = _matrices(model)
    if not matrices:
        rule = "it has no linear or convolution layer"
        raise refusal("model", type(model).__name__, rule, "Measure the model that has them")
    kept = [matrix.clone() for matrix in matrices]
    try:
        for matrix in matrices:
            matrix.copy_(_quantised(matrix, 2 ** (bits - 1) - 1, group_size))
        yield
    finally:
        for matrix, before in zip(matrices, kept, strict=True):
            matrix.copy_(before)


def _matrices(model: nn.Module) -> list[Tensor]:
    """A view (outputs, inputs) of each weight, those that several layers share once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            weight = module.weight.data
            found[id(module.weight)] = weight.view(len(weight), -1)
        elif isinstance(module, Conv1D):  # of GPT-2, which holds its matrix transposed
            found[id(module.weight)] = module.weight.data.t()
    return list(found.values())


def _quantised(matrix: Tensor, levels: int, group_size: int | None) -> Tensor:
    groups = matrix.float().split(group_size or matrix.shape[1], dim=1)
    return torch.cat([_rounded(group, levels) for group in groups], dim=1)


def _rounded(group: Tensor, levels: int) -> Tensor:
    scale = group.abs().amax(dim=1, keepdim=True) / levels
    return torch.where(scale > 0, (group / scale).round() * scale, group)

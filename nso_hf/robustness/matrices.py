"""The weights that are changed: those of linear, attention and convolution layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nso_hf.refusal import refusal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Of queries, keys and values: together, or apart where their inputs differ in size."""


@contextmanager
def changed(model: nn.Module, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, each matrix is what `change` makes of its number and itself; afterwards all are as
    before, bit for bit.

    Raises:
        ValueError: there is no such layer.
    """
    check_matrices(model)
    found = matrices(model)
    kept = [matrix.clone() for matrix in found]
    try:
        for number, matrix in enumerate(found):
            matrix.copy_(change(number, matrix))
        yield
    finally:
        for matrix, before in zip(found, kept, strict=True):
            matrix.copy_(before)


def check_matrices(model: nn.Module) -> None:
    if not matrices(model):
        rule = "it has no linear or convolution layer"
        raise refusal("model", type(model).__name__, rule, "Measure the model that has them")


def matrices(model: nn.Module) -> list[Tensor]:
    """A view (outputs, inputs) of each weight, those that several layers share once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            weight = module.weight.data
            found[id(module.weight)] = weight.view(len(weight), -1)
        elif isinstance(module, Conv1D):  # of GPT-2, which holds its matrix transposed
            found[id(module.weight)] = module.weight.data.t()
        elif isinstance(module, nn.MultiheadAttention):  # its output projection is a linear layer
            held = [getattr(module, name) for name in _OF_ATTENTION]
            found |= {id(weight): weight.data for weight in held if weight is not None}
    return list(found.values())


def wide(matrix: Tensor) -> Tensor:
    """The matrix in float32 at least."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

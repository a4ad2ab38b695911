"""Weights with the smallest set to zero."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nso_hf.refusal import refusal
from nso_hf.robustness.matrices import changed


@contextmanager
def pruned(model: nn.Module, *, sparsity: float) -> Iterator[None]:
    """Inside, of each weight of a linear or convolution layer the share `sparsity` that is smallest
    in magnitude is zero; afterwards they are as before, bit for bit.

    Raises:
        ValueError: `sparsity` is not above 0 and below 1, or there is no such layer.
    """
    check_sparsity(sparsity)

    def sparse(_: int, matrix: Tensor) -> Tensor:
        smallest = matrix.abs().flatten().topk(round(sparsity * matrix.numel()), largest=False)
        flat = matrix.flatten()  # a copy where the matrix is not contiguous
        return flat.scatter(0, smallest.indices, 0.0).view(matrix.shape)

    with changed(model, sparse):
        yield


def check_sparsity(sparsity: float) -> None:
    is_number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not (is_number and 0 < sparsity < 1):
        raise refusal("sparsity", sparsity, "not a share above 0 and below 1", "Use 0.5 to 0.9")

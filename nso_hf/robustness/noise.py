"""Weights with noise in them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nso_hf.refusal import check_positive
from nso_hf.robustness.matrices import changed, wide


@contextmanager
def weight_noise(
    model: nn.Module, *, std: float, relative: bool = False, seed: int = 0
) -> Iterator[None]:
    """Inside, the weights of linear and convolution layers have normal noise added; afterwards they
    are as before, bit for bit.

        W + std Z,    Z ~ N(0, I)

    Args:
        relative: `std` is over the root mean square of the weights of an output (a row, a filter).
        seed: of the noise, which is the same on every device.

    Raises:
        ValueError: `std` is no positive number, or there is no such layer.
    """
    check_positive("std", std, "Typical: 0.01, or relative 0.1")

    def noisy(number: int, matrix: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = torch.randn(matrix.shape, generator=generator).to(matrix.device)
        exact = wide(matrix)
        scale = exact.square().mean(dim=1, keepdim=True).sqrt() if relative else 1.0
        return exact + std * scale * noise

    with changed(model, noisy):
        yield

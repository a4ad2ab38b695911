"""Weights borrowed for an evaluation: moved to W + U or W - U in place, given back bit for bit."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from nso_hf.backends import Backend, Weight

_CHUNK = 2**18  # elements compared at a time: what `measure` allocates, and no more


class Displacement(Protocol):
    """A displacement U of the weights.

    Two that compare equal are taken for the same U; one that holds tensors should compare by
    identity.
    """

    def add_to(self, weights: Sequence[Weight]) -> None:
        """Add U to each local weight, in place."""


class Perturbation:
    """The weights W and where they are now.

    One backup of the local weights is all the memory it takes, from the first displacement on. The
    restored weights are a copy of that backup: in floating point, W + U - U is not W.
    """

    def __init__(self, weights: Sequence[Weight], backend: Backend) -> None:
        self._weights = weights
        self._backend = backend
        self._data = [weight.data for weight in weights]
        self._backup: list[Tensor] | None = None
        self._at: tuple[Displacement, int] | None = None

    def move_to(self, displacement: Displacement | None, sign: int = 1) -> None:
        """Put the weights at W + sign U, or at W where there is no displacement."""
        if self._at is not None and self._at == (displacement, -sign):
            self._backend.discard_gathered()
            self._reflect()
        else:
            self.restore()
            if displacement is not None:
                self._backend.discard_gathered()
                if self._backup is None:
                    self._backup = [data.clone() for data in self._data]
                self._at = (displacement, 1)
                displacement.add_to(self._weights)
                if sign < 0:
                    self._reflect()
        if displacement is not None:
            self._at = (displacement, sign)
            torch.clear_autocast_cache()

    def _reflect(self) -> None:
        """W + U -> W - U = 2 W - (W + U), in one rounding: no noise is drawn or kept for it."""
        assert self._backup is not None
        torch._foreach_neg_(self._data)
        torch._foreach_add_(self._data, self._backup, alpha=2)

    def restore(self) -> None:
        """Put the weights back at W, bit for bit."""
        if self._at is not None:
            assert self._backup is not None
            try:
                self._backend.discard_gathered()
            finally:
                torch._foreach_copy_(self._data, self._backup)
                torch.clear_autocast_cache()
            self._at = None

    def measure(self) -> tuple[float, float]:
        """The norm of the displacement of the whole model as the stored weights carry it, and the
        fraction of elements it moved."""
        if self._backup is None:
            return 0.0, 0.0
        device = self._data[0].device
        sums = []  # of squares, and of elements that moved
        for weight, backup in zip(self._weights, self._backup, strict=True):
            for now, before in zip(
                weight.data.reshape(-1).split(_CHUNK), backup.reshape(-1).split(_CHUNK), strict=True
            ):
                difference = now.float() - before.float()
                moved = difference.count_nonzero().float()
                sums.append(torch.stack([difference.square().sum(), moved]).to(device))
                sums[-1] /= weight.copies
        squares, moved = torch.stack(sums).cpu().double().sum(dim=0)  # one wait for the device
        elements = sum(weight.data.numel() / weight.copies for weight in self._weights)
        total = self._backend.total(torch.stack([squares, moved, moved.new_tensor(elements)]))
        squares, moved, elements = total.tolist()
        return math.sqrt(squares), moved / elements


@contextmanager
def borrowed(weights: Sequence[Weight], backend: Backend) -> Iterator[Perturbation]:
    """The weights, free to move inside; back at W on the way out, whatever happened inside."""
    perturbation = Perturbation(weights, backend)
    try:
        yield perturbation
    except BaseException:
        backend.abandon()
        raise
    finally:
        try:
            perturbation.restore()
        except BaseException:  # an interrupt in the middle of the copy: finish it first
            perturbation.restore()
            raise

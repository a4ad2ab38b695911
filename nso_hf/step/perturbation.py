"""Weights borrowed for an evaluation: moved to W + U or W - U in place, given back bit for bit."""

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nso_hf.backends import Backend, Weight
from nso_hf.step.edits import checksums

_CHUNK = 2**18  # elements compared at a time: what `measure` allocates, and no more
_IN_CACHE = 2**16  # elements that stay in that of a core
_IN_A_KERNEL = 2**22  # elements that keep a GPU busy


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
    restored weights are a copy of that backup: in floating point, W + U - U is not W. Between the
    micro-batches of a step it can hold the displaced weights instead, so that U is drawn once.

    Args:
        backup: where it is: on the "device" of each weight, or on the "cpu".
    """

    def __init__(
        self, weights: Sequence[Weight], backend: Backend, *, backup: str = "device"
    ) -> None:
        self._weights = weights
        self._backend = backend
        self._is_on_cpu = backup == "cpu"
        self._data = [weight.data for weight in weights]
        self._backup: list[Tensor] | None = None
        self._at: tuple[Displacement, int] | None = None
        self._parked: tuple[Displacement, int] | None = None  # what the backup holds instead of W
        self._at_parking: list[Any] = []
        self.was_edited = False  # while weights were parked

    def is_of(self, weights: Sequence[Weight]) -> bool:
        """Whether these are the weights."""
        return self._weights is weights

    def move_to(self, displacement: Displacement | None, sign: int = 1) -> None:
        """Put the weights at W + sign U, or at W where there is no displacement."""
        if displacement is None:
            self.restore()
            return
        if self._at == (displacement, -sign):
            self._backend.discard_gathered()
            self._reflect()
        elif self._at is None and self._is_parked_at(displacement):
            self._backend.discard_gathered()
            self._exchange(sign)
        else:
            self.restore()
            self._backend.discard_gathered()
            self._keep()
            self._at = (displacement, 1)
            displacement.add_to(self._weights)
            if sign < 0:
                self._reflect()
        self._at = (displacement, sign)
        torch.clear_autocast_cache()

    def _keep(self) -> None:
        if self._backup is None:
            made = _on_cpu if self._is_on_cpu else torch.clone
            self._backup = [made(data) for data in self._data]
        elif self._parked is not None:
            torch._foreach_copy_(self._backup, self._data, non_blocking=True)
        self._parked = None

    def _reflect(self) -> None:
        """W + U -> W - U = x + 2 (W - x), x = W + U: no noise is drawn or kept for it."""
        assert self._backup is not None
        if not self._is_on_cpu:
            torch._foreach_lerp_(self._data, self._backup, 2)
            return
        for weights, backups in _pieces(self._data, self._backup):
            torch._foreach_lerp_(weights, _beside(weights, backups), 2)

    def restore(self) -> None:
        """Put the weights back at W, bit for bit."""
        if self._at is not None:
            assert self._backup is not None
            try:
                self._backend.discard_gathered()
            finally:
                torch._foreach_copy_(self._data, self._backup, non_blocking=True)
                torch.clear_autocast_cache()
            self._at = None

    def park(self, *, thoroughly: bool) -> None:
        """Put the weights back at W, bit for bit, and keep where they were in place of the backup,
        for the next micro-batch. `thoroughly`: notice edits through `.data` too, for two readings
        of the weights and a wait for the device.
        """
        if self._at is None:
            return
        self._backend.discard_gathered()
        self._exchange(self._at[1])
        torch.clear_autocast_cache()
        self._at_parking = self._versions()
        self._at_parking += checksums(self._weights) if thoroughly else []

    def _is_parked_at(self, displacement: Displacement) -> bool:
        if self._parked is None or self._parked[0] != displacement:
            return False
        now = self._versions()
        if len(self._at_parking) > len(now):
            now += checksums(self._weights)
        self.was_edited |= now != self._at_parking
        return now == self._at_parking

    def _versions(self) -> list[Any]:
        """What changes when a weight is written to, or when another tensor takes its place."""
        return [(weight.parameter._version, weight.data.data_ptr()) for weight in self._weights]

    def _exchange(self, sign: int) -> None:
        """Swap the weights with their backup, in place: what is displaced is at W + sign U."""
        assert self._backup is not None
        is_mirrored = self._parked is not None and self._parked[1] != sign
        pieces = _pieces(self._data, self._backup)
        with interrupts_deferred():  # half of it would be no known place
            for weights, backups in pieces:
                were = [weight.clone() for weight in weights]
                if is_mirrored:  # W - U = W - (x - W), x = W + U
                    torch._foreach_lerp_(weights, _beside(weights, backups), -1)
                else:
                    torch._foreach_copy_(weights, backups, non_blocking=True)
                torch._foreach_copy_(backups, were, non_blocking=True)
            self._at, self._parked = self._parked, self._at

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
                difference = now.float() - before.to(now.device).float()
                moved = difference.count_nonzero().float()
                sums.append(torch.stack([difference.square().sum(), moved]).to(device))
                sums[-1] /= weight.copies
        squares, moved = torch.stack(sums).cpu().double().sum(dim=0)  # one wait for the device
        elements = sum(weight.data.numel() / weight.copies for weight in self._weights)
        total = self._backend.total(torch.stack([squares, moved, moved.new_tensor(elements)]))
        squares, moved, elements = total.tolist()
        return math.sqrt(squares), moved / elements


def _on_cpu(weight: Tensor) -> Tensor:
    """A copy, in memory that a GPU reads and writes without waiting. PyTorch keeps that memory for
    the next one."""
    is_pinned = weight.device.type != "cpu"
    copy = torch.empty_like(weight, device="cpu", pin_memory=is_pinned)
    return copy.copy_(weight, non_blocking=True)


def _beside(weights: Sequence[Tensor], backups: Sequence[Tensor]) -> list[Tensor]:
    """The backups where the weights are."""
    pairs = zip(weights, backups, strict=True)
    return [backup.to(weight.device, non_blocking=True) for weight, backup in pairs]


def _pieces(
    weights: Sequence[Tensor], backups: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Parts of the weights and the same parts of their backups, each of a few elements in all: what
    work on them may allocate."""
    pieces: list[tuple[list[Tensor], list[Tensor]]] = []
    left = 0
    for whole, backup in zip(weights, backups, strict=True):
        size = _IN_CACHE if whole.device.type == "cpu" else _IN_A_KERNEL
        pairs = [(whole, backup)]
        if whole.numel() > size and whole.is_contiguous() and backup.is_contiguous():
            flat = (whole.view(-1).split(size), backup.view(-1).split(size))
            pairs = list(zip(*flat, strict=True))
        for weight, other in pairs:
            if left < weight.numel() or not pieces:
                pieces.append(([], []))
                left = size
            pieces[-1][0].append(weight)
            pieces[-1][1].append(other)
            left -= weight.numel()
    return pieces


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


@contextmanager
def borrowed(
    weights: Sequence[Weight],
    backend: Backend,
    perturbation: Perturbation | None = None,
) -> Iterator[Perturbation]:
    """The weights, free to move inside; back at W on the way out, whatever happened inside.

    Args:
        perturbation: of these weights, which is used.
    """
    perturbation = perturbation or Perturbation(weights, backend)
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

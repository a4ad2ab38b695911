"""Noise as a counter, on GPUs: Philox of each element's position in the whole weight, added in
place by one kernel for all weights. No generators, no tensor of noise; any shard gets its part."""

import hashlib
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK = 2048  # elements per program of the kernel


class Part(NamedTuple):
    """What a process holds of one weight: `data`, from position `start` of the whole on."""

    data: Tensor
    """Contiguous."""
    start: int
    weight: int
    """Its number in the model."""
    rows: Tensor | None = None
    """Factors of the noise: element at position p takes number (p // length) mod their number."""
    length: int = 1


@cache
def serves(device_type: str) -> bool:
    """Whether the noise of weights on such devices is drawn here: where Triton can compile."""
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return device_type in ("cuda", "xpu") and compiler is not None


def key(seed: int, step: int, draw: int) -> tuple[int, int]:
    """Philox's 64-bit key of a draw of all weights, as two 32-bit integers with a sign."""
    packed = struct.pack("<3q", seed, step, draw)
    low, high = struct.unpack("<2i", hashlib.blake2b(packed, digest_size=8).digest())
    return low, high


def add(
    parts: Sequence[Part], seed: int, step: int, draw: int, std: float, distribution: str
) -> None:
    """Add std u to each part in place, rounded once: one launch for each dtype and device."""
    from nso_hf.step.counter_kernel import DTYPES, launch

    groups: dict[tuple[torch.device, torch.dtype, bool], list[Part]] = {}
    for part in parts:
        if part.data.numel():
            kind = (part.data.device, part.data.dtype, part.rows is not None)
            groups.setdefault(kind, []).append(part)
    for (device, dtype, has_rows), group in groups.items():
        assert dtype in DTYPES, dtype
        rows = torch.cat([part.rows.float() for part in group]) if has_rows else None  # type: ignore[union-attr]
        places = tuple(
            (
                part.data.data_ptr(),
                part.start,
                part.data.numel(),
                part.weight,
                part.length,
                0 if part.rows is None else part.rows.numel(),
            )
            for part in group
        )
        table, owners = _tables(device, places)
        on_device: Any = nullcontext()
        if device.type != "cpu":
            on_device = torch.get_device_module(device).device(device)
        with on_device:
            launch(table, owners, rows, key(seed, step, draw), std, distribution, dtype, _CHUNK)


@lru_cache(maxsize=16)
def _tables(device: torch.device, places: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """A row per part for the kernel: address, start, size, weight, first chunk, length, first of
    its rows, number of rows; and the part that each chunk belongs to. Copied to the device once."""
    rows: list[tuple[int, ...]] = []
    owners: list[int] = []
    first_row = 0
    for number, (address, start, size, weight, length, num_rows) in enumerate(places):
        rows.append((address, start, size, weight, len(owners), length, first_row, num_rows))
        # A chunk begins at a position that is a multiple of 4: Philox gives four words at a time.
        owners += [number] * -(-(start % 4 + size) // _CHUNK)
        first_row += num_rows
    return (
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
    )

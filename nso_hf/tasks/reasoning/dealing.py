"""Batches dealt over the processes."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator

T = TypeVar("T")


def dealt(
    items: Sequence[T], length: Callable[[T], int], batch_size: int, accelerator: Accelerator
) -> list[list[T]]:
    """This process's batches, each of items of about one length. Some are dealt twice, since every
    process gets as many: where weights are sharded, all take part in every pass."""
    processes = accelerator.num_processes
    # No larger than lets every process have a batch.
    size = min(batch_size, math.ceil(len(items) / processes))
    ordered = sorted(items, key=length)
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    mine = batches[accelerator.process_index :: processes]
    return mine + batches[: math.ceil(len(batches) / processes) - len(mine)]

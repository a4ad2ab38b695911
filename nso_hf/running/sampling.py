"""A part of the data that stands for all of it, in whichever order they lie."""

from collections.abc import Iterable
from random import Random
from typing import TypeVar

T = TypeVar("T")


def places(number: int | None, total: int, seed: int = 0) -> list[int]:
    """`number` of the positions 0, ..., total - 1, drawn without replacement, ascending; all where
    there are no more (or `number` is None)."""
    if number is None or number >= total:
        return list(range(total))
    return sorted(Random(seed).sample(range(total), number))


def drawn(items: Iterable[T], number: int | None, seed: int = 0) -> tuple[list[T], int]:
    """So many of the items, each equally likely, in their order, and how many there are. They are
    read once, and no more than `number` are held (Vitter's algorithm R)."""
    random, kept, total = Random(seed), list[tuple[int, T]](), 0
    for total, item in enumerate(items, 1):
        if number is None or len(kept) < number:
            kept.append((total, item))
        elif (place := random.randrange(total)) < number:
            kept[place] = (total, item)
    return [item for _, item in sorted(kept, key=lambda each: each[0])], total

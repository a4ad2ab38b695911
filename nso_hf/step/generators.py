"""Random number generators that a model or a trainer owns, and their states."""

import functools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (
    str,
    bytes,
    int,
    float,
    type,
    ModuleType,
    torch.Tensor,
    np.ndarray,
    Dataset,
    DataLoader,
)
_MOST = 10_000  # items of a container that is searched: longer ones hold data
_DATA = ("train_dataset", "eval_dataset")


def generators_of(*owners: object) -> list[Generator]:
    """The generators among the attributes of `owners`, of the objects, containers, partial
    functions, closures and bound methods there, and so on.

    Not found are those in data sets, in containers of more than 10,000 items, in global variables,
    and in objects without a `__dict__`.
    """
    found: list[Generator] = []
    seen: set[int] = set()
    left: list[object] = list(owners)
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        if isinstance(item, random.SystemRandom):  # has no state
            continue
        if isinstance(item, _KINDS):
            found.append(item)
        else:
            left.extend(_held_by(item))
    return found


def _held_by(item: Any) -> Iterable[object]:
    if isinstance(item, Mapping):
        return item.values() if len(item) <= _MOST else ()
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return item if len(item) <= _MOST else ()
    if isinstance(item, functools.partial):
        return (item.func, item.args, item.keywords)
    return _attributes_of(item)


def _attributes_of(item: Any) -> Iterator[object]:
    yield getattr(item, "__self__", None)  # of a bound method
    for cell in getattr(item, "__closure__", None) or ():
        yield from _contents(cell)
    for name, value in getattr(item, "__dict__", {}).items():
        if not (isinstance(item, Trainer) and name in _DATA):
            yield value
    if isinstance(item, nn.Module):
        yield from item.children()


def _contents(cell: Any) -> Iterator[object]:
    try:
        yield cell.cell_contents
    except ValueError:  # it is empty
        return


def state_of(generator: Generator) -> Any:
    """What `set_state` puts back."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)

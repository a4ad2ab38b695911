"""Weights that lie over the same memory, as objects of their own: tied by `b.data = a.data`, or
views of one tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nso_hf.backends import Weight
from nso_hf.refusal import refusal


def without_aliases(weights: Sequence[Weight]) -> list[Weight]:
    """The weights, but of those over exactly the same memory the first alone: what is written to it
    is written to all of them.

    Raises:
        ValueError: two share a part of their memory, or one has elements that are the same memory.
    """
    distinct: dict[tuple[object, ...], Weight] = {}
    for weight in weights:
        extent, numel = _extent(weight.data), weight.data.numel()
        if extent < numel:
            rule = "several of its elements are one place in memory"
            cure = "Make it contiguous, weight.data = weight.data.clone()"
            raise refusal("parameter", weight.name, rule, cure)
        # Of the same places in the same memory, in whatever order where there is none in between.
        places = (*_span(weight.data), () if extent == numel else weight.data.stride())
        distinct.setdefault(places if numel else (weight.index,), weight)
    for group in _overlapping([weight for weight in distinct.values() if weight.data.numel()]):
        if _share_memory([weight.data for weight in group]):
            rule = f"it shares a part of its memory with {group[0].name}"
            cure = "Give each its own memory, or make them one parameter, b.weight = a.weight"
            raise refusal("parameter", group[1].name, rule, cure)
    return list(distinct.values())


def _extent(data: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if data.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))


def _span(data: Tensor) -> tuple[torch.device, int, int]:
    """Where its first element begins and its last one ends."""
    start = data.data_ptr()
    return data.device, start, start + _extent(data) * data.element_size()


def _overlapping(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Groups of two or more whose spans follow each other without an end in between."""
    group: list[Weight] = []
    reach = (torch.device("meta"), 0)
    for weight in sorted(weights, key=lambda w: (str(w.data.device), w.data.data_ptr())):
        device, start, end = _span(weight.data)
        if device == reach[0] and start < reach[1]:
            group.append(weight)
            reach = (device, max(reach[1], end))
            continue
        if len(group) > 1:
            yield group
        group, reach = [weight], (device, end)
    if len(group) > 1:
        yield group


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether any place in memory belongs to two elements of these tensors."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        return True
    size, first = tensors[0].element_size(), min(tensor.data_ptr() for tensor in tensors)
    offsets = [(tensor.data_ptr() - first) // size for tensor in tensors]
    extents = [_extent(tensor) for tensor in tensors]
    memory = torch.arange(max(o + e for o, e in zip(offsets, extents, strict=True)))
    places = torch.cat(
        [
            memory[offset:].as_strided(tensor.shape, tensor.stride()).flatten()
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]
    )
    return len(places.unique()) < len(places)

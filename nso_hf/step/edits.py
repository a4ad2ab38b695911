"""Weights that a pass writes to: what it writes at W + U would be lost with the displacement, and
W - U would not be the mirror image of W + U."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nso_hf.backends import Weight
from nso_hf.refusal import refusal

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def edits_refused(
    every: Sequence[Weight], displaced: Sequence[Weight], is_thorough: bool
) -> Iterator[None]:
    """Refuse a pass inside that writes to any weight of the model in place, or puts another tensor
    there; with `is_thorough` also one that writes to a displaced one through `.data`, for two
    readings of these.

    Raises:
        ValueError: the pass wrote to a weight.
    """
    watched = [weight for weight in every if _is_whole(weight)]
    seen = [_seen(weight.parameter) for weight in watched]
    sums = checksums(displaced) if is_thorough else None
    yield
    for weight, earlier in zip(watched, seen, strict=True):
        if _seen(weight.parameter) != earlier:
            raise _refusal(weight)
    if sums is not None:
        for weight, before, after in zip(displaced, sums, checksums(displaced), strict=True):
            if before != after:
                raise _refusal(weight)


def _seen(parameter: Tensor) -> tuple[int, int]:
    """What changes when it is written to in place, or when another tensor takes its place."""
    return parameter._version, parameter.data_ptr()


def _is_whole(weight: Weight) -> bool:
    """Whether the parameter is what forward passes read: a shard's parameter is made anew."""
    is_wrapper = is_traceable_wrapper_subclass(weight.parameter)
    return not is_wrapper and weight.parameter.numel() == weight.numel


def checksums(weights: Sequence[Weight]) -> list[int]:
    """Of the bits of each weight."""
    sums = [_bits(weight.data).sum(dtype=torch.int64) for weight in weights]
    return torch.stack([value.to(sums[0].device) for value in sums]).tolist()  # one wait


def _bits(data: Tensor) -> Tensor:
    return data.view(_INTEGERS[data.element_size()])


def _refusal(weight: Weight) -> ValueError:
    rule = "the model or its trainer writes to it within a training step, while it is displaced"
    cure = (
        "Switch that off (Embedding: max_norm=None, RWKV: rescale_every=0, weight clamping), or "
        "move it to a callback's on_step_end"
    )
    return refusal("parameter", weight.name, rule, cure)

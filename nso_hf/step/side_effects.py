"""Passes that leave nothing behind but gradients, so that several of them count as one, and each
sees what the first one saw."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from nso_hf.refusal import refusal
from nso_hf.step.counts import counts_kept
from nso_hf.step.generators import Generator, generators_of, set_state, state_of

logger = logging.get_logger(__name__)

_LARGE = 2**16  # elements; a buffer of more is copied only if passes change it


@contextmanager
def random_state_kept(
    devices: set[torch.device], generators: Sequence[Generator] = ()
) -> Iterator[None]:
    """Random numbers drawn inside, globally or from `generators`, are drawn again after it."""
    accelerators = [device for device in devices if device.type != "cpu"]
    states = [_module_of(device).get_rng_state(*_number(device)) for device in accelerators]
    state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )
    own_states = [state_of(generator) for generator in generators]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for device, device_state in zip(accelerators, states, strict=True):
            _module_of(device).set_rng_state(device_state, *_number(device))
        for generator, own_state in zip(generators, own_states, strict=True):
            set_state(generator, own_state)


def _module_of(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _number(device: torch.device) -> tuple[torch.device, ...]:
    """What tells one accelerator from others: on a Mac there is one, and no argument for it."""
    return () if device.type == "mps" else (device,)


class Buffers:
    """The buffers of a model: running statistics, power iterations, code books, counters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Large ones that the first pass left as they were, id -> name: they are not copied.
        self._constant: dict[int, str] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Every buffer, whether written in place, replaced or added inside, is as before
        afterwards. It takes a copy of those that change, and of the small ones."""
        registered = [(module._buffers, dict(module._buffers)) for module in self._model.modules()]
        named = {
            id(tensor): (name, tensor)
            for _, held in registered
            for name, tensor in held.items()
            if tensor is not None
        }
        constant = self._constant or {}
        written = [tensor for key, (_, tensor) in named.items() if key not in constant]
        copies = [tensor.detach().clone() for tensor in written]
        versions = {key: tensor._version for key, (_, tensor) in named.items() if key in constant}
        try:
            yield
            if self._constant is None:
                self._constant = {
                    id(tensor): named[id(tensor)][0]
                    for tensor, before in zip(written, copies, strict=True)
                    if tensor.numel() > _LARGE and torch.equal(tensor, before)
                }
        finally:
            for buffers, held in registered:
                if [*map(id, buffers.values())] != [*map(id, held.values())] or [*buffers] != [
                    *held
                ]:
                    buffers.clear()
                    buffers.update(held)
            if written:
                # .data, since a graph built before has saved what is put back here: no change to it
                torch._foreach_copy_([tensor.data for tensor in written], copies)
            for key in [
                key for key, version in versions.items() if named[key][1]._version > version
            ]:
                logger.warning_once(
                    f"The buffer {constant.pop(key)} has changed for the first time: this once, "
                    "every evaluation of the micro-batch has changed it."
                )


def copied(inputs: Any) -> Any:
    """A batch of its own for a pass that may edit it: tensors, containers and caches.

    Raises:
        ValueError: something in it cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): _own(tensor) for tensor in _tensors_in(inputs)}
    try:
        return copy.deepcopy(inputs, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        kinds = {name: type(value).__name__ for name, value in inputs.items()}
        rule = f"it cannot be copied ({error}), so the evaluations of a step could not see the same"
        cure = "Let the data collator return tensors, lists and dicts"
        raise refusal("inputs", kinds, rule, cure) from error


def _own(tensor: Tensor) -> Tensor:
    # Not a deep copy, which would copy all of the data set that the tensor may be a view of.
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


class SideEffects:
    """What the passes of a trainer over a model change besides gradients."""

    def __init__(self, trainer: object, model: nn.Module) -> None:
        self._trainer = trainer
        self._buffers = Buffers(model)
        self._generators = generators_of(model, trainer)

    @contextmanager
    def undone(self, devices: set[torch.device], keep_random_state: bool) -> Iterator[None]:
        """All of the above; without `keep_random_state` the pass draws random numbers of its
        own."""
        with ExitStack() as stack:
            stack.enter_context(self._buffers.kept())
            stack.enter_context(counts_kept(self._trainer))
            if keep_random_state:
                stack.enter_context(random_state_kept(devices, self._generators))
            yield

"""Passes that leave nothing behind but gradients, so that several of them count as one."""

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BOOKKEEPING = ("_metrics", "_stored_metrics", "_total_train_tokens")
"""What trainers of TRL add to in every call of `compute_loss`."""


@contextmanager
def random_state_kept(devices: set[torch.device]) -> Iterator[None]:
    """Random numbers drawn inside are drawn again after it."""
    accelerators = [device for device in devices if device.type != "cpu"]
    states = [_module_of(device).get_rng_state(*_number(device)) for device in accelerators]
    state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for device, device_state in zip(accelerators, states, strict=True):
            _module_of(device).set_rng_state(device_state, *_number(device))


def _module_of(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _number(device: torch.device) -> tuple[torch.device, ...]:
    """What tells one accelerator from others: on a Mac there is one, and no argument for it."""
    return () if device.type == "mps" else (device,)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the statistics of the batch inside, as in training, and remembers
    none of them."""
    # In training mode a layer that does not track the running statistics differs in nothing else.
    tracking = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def bookkeeping_kept(trainer: object) -> Iterator[None]:
    """Figures that the trainer itself collects in each pass are as before afterwards."""
    kept: dict[str, Any] = {
        name: copy.deepcopy(getattr(trainer, name))
        for name in _BOOKKEEPING
        if hasattr(trainer, name)
    }
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


@contextmanager
def without_side_effects(
    trainer: object, model: nn.Module, devices: set[torch.device], keep_random_state: bool
) -> Iterator[None]:
    """All of the above; without `keep_random_state` the pass draws random numbers of its own."""
    with ExitStack() as stack:
        stack.enter_context(running_statistics_kept(model))
        stack.enter_context(bookkeeping_kept(trainer))
        if keep_random_state:
            stack.enter_context(random_state_kept(devices))
        yield

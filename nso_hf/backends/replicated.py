"""Whole weights in every process: one process, or several under DistributedDataParallel."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn

from nso_hf.backends.base import Backend, Weight


class Replicated(Backend):
    """Every process holds the whole model; one process is the case of a single replica."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank = accelerator.process_index
        self.num_replicas = accelerator.num_processes

    def weights(self, model: nn.Module) -> list[Weight]:
        model = self._accelerator.unwrap_model(model, keep_torch_compile=False)
        return [
            Weight(name, index, parameter, parameter.data, start=0, numel=parameter.numel())
            for index, (name, parameter) in enumerate(model.named_parameters())
        ]

    @contextmanager
    def accumulate_only(self, model: nn.Module) -> Iterator[None]:
        # A static graph is recorded in its first backward pass and has to be the same in each: it
        # reduces in every pass. What was reduced before is equal on all replicas, so the sum is
        # the same.
        if getattr(model, "static_graph", False):
            yield
        else:
            with self._accelerator.no_sync(model):
                yield

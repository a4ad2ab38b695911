"""Whole weights in every process: one process, or several under DistributedDataParallel."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nso_hf.backends.base import Backend, Weight
from nso_hf.backends.errors import adds_gradients, not_prepared


class Replicated(Backend):
    """Every process holds the whole model; one process is the case of a single replica."""

    stays = True

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(accelerator, model)
        self.name = "one process" if self.num_processes == 1 else "DistributedDataParallel"

    def discard_gathered(self) -> None:
        """Nothing is gathered."""

    def holds(self, weights: Sequence[Weight]) -> bool:
        return all(weight.data.data_ptr() == weight.parameter.data_ptr() for weight in weights)

    def share_buffers(self) -> None:
        for module in self._wrappers():
            if module.will_sync_module_buffers():
                module._sync_buffers()
                module.require_forward_param_sync = False  # done, for the next forward pass

    def average_copies(self, tensors: Sequence[Tensor]) -> None:
        self.summed(tensors)
        torch._foreach_div_(list(tensors), self.num_processes)

    def check_prepared(self) -> None:
        if self.num_processes > 1 and not self._wrappers():
            raise not_prepared(self._model, "wrapped in DistributedDataParallel")

    def _wrappers(self) -> list[DistributedDataParallel]:
        return [m for m in self._model.modules() if isinstance(m, DistributedDataParallel)]

    def total(self, values: Tensor) -> Tensor:
        return self.num_processes * values  # every process has the same

    def _without_reduction(self, is_first: bool) -> AbstractContextManager[None]:
        # A static graph is recorded in its first backward pass and has to be the same in each: it
        # reduces in every pass. What was reduced before is equal on all replicas, so the sum is
        # the same.
        if getattr(self._model, "static_graph", False):
            return nullcontext()
        no_sync: AbstractContextManager[None] = self._accelerator.no_sync(self._model)
        return no_sync

    def check_keeps_gradients_apart(self, method: str) -> None:
        if getattr(self._model, "static_graph", False):
            raise adds_gradients(method, "with a static graph every pass reduces all gradients")


class ThisProcess:
    """Stands for an `Accelerator` of one process, whatever others there may be: to make one would
    change the state that all of them share."""

    num_processes, process_index = 1, 0

    def __init__(self, model: nn.Module) -> None:
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def unwrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        unwrapped: nn.Module = extract_model_from_parallel(model, **options)
        return unwrapped

"""Whole weights in every process: one process, or several under DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nso_hf.backends.base import Backend, not_prepared


class Replicated(Backend):
    """Every process holds the whole model; one process is the case of a single replica."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(accelerator, model)
        self.name = "one process" if self.num_processes == 1 else "DistributedDataParallel"

    def discard_gathered(self) -> None:
        """Nothing is gathered."""

    def check_prepared(self) -> None:
        wrapped = any(isinstance(m, DistributedDataParallel) for m in self._model.modules())
        if self.num_processes > 1 and not wrapped:
            raise not_prepared(self._model, "wrapped in DistributedDataParallel")

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

"""DeepSpeed's ZeRO, stages 0 to 3.

The optimizer's weights are copies (stages 1 to 3) in float32; the forward pass uses the model's own
tensors, which are whole up to stage 2 and flat partitions in stage 3. Those are what is perturbed;
the optimizer's step overwrites them from its copies. DeepSpeed steps inside its backward pass,
when the weights are still perturbed: the step is put off.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nso_hf.backends.base import Backend, Weight
from nso_hf.backends.errors import not_prepared

ZERO_3 = 3


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole weight, also of one that was partitioned when its model was loaded."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class DeepSpeed(Backend):
    """Every process holds the whole model, or from stage 3 on a partition of each weight."""

    keeps_gradients_apart = False
    steps_on_copies = True

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(accelerator, model)
        offloads = accelerator.state.deepspeed_plugin.hf_ds_config.is_offload()
        self.name = f"DeepSpeed ZeRO-{self._stage}" + (", offloaded to the CPU" if offloads else "")
        if self._stage == ZERO_3:
            self.num_copies, self.copy = 1, 0

    def _held(self, name: str, index: int, parameter: nn.Parameter) -> Weight:
        if not hasattr(parameter, "ds_tensor"):
            return super()._held(name, index, parameter)
        held: Any = parameter
        start = self._accelerator.process_index * held.ds_tensor.ds_numel
        size = max(0, min(held.ds_tensor.ds_numel, held.ds_numel - start))  # the rest is padding
        data = held.ds_tensor.data.narrow(0, 0, size)
        return Weight(name, index, parameter, data, start, held.ds_shape)

    def optimised(self, optimizer: Any) -> set[int]:
        zero = self._engine.optimizer if self._engine is not None else None
        groups = getattr(zero, "bit16_groups", None) or getattr(zero, "fp16_groups", None)
        if groups is None:
            return super().optimised(optimizer)
        return {id(parameter) for group in groups for parameter in group}

    def discard_gathered(self) -> None:
        # Small weights stay gathered from one pass to the next, as long as the optimizer has not
        # stepped.
        if self._stage == ZERO_3 and self._engine is not None:
            self._engine.optimizer._partition_all_parameters()

    def _without_reduction(self, is_first: bool) -> AbstractContextManager[None]:
        # It follows from `sync_gradients`: up to stage 1 gradients are reduced once, before the
        # step; from stage 2 on in each backward pass, which adds to the partition of this process.
        return nullcontext()

    def whole(self, weight: Weight) -> Tensor:
        if not hasattr(weight.parameter, "ds_tensor"):
            return super().whole(weight)
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight.parameter]):
            return weight.parameter.detach().clone()

    def check_prepared(self) -> None:
        if self._engine is None:
            raise not_prepared(self._model, "held by DeepSpeed")

    @property
    def differentiates_twice(self) -> bool:
        return self._stage < ZERO_3

    def gradient(self, loss: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        if self._stage < ZERO_3:
            return super().gradient(loss, weights)
        from deepspeed.utils import safe_get_local_grad

        engine = self._engine
        boundary = engine.is_gradient_accumulation_boundary()
        engine.optimizer.zero_grad()  # the partitions of gradients are written, not added to
        engine.set_gradient_accumulation_boundary(True)
        try:
            engine.backward(loss * self.num_processes, scale_wrt_gas=False)
            gradients = []
            for weight in weights:
                gradient = safe_get_local_grad(weight.parameter)
                gradients.append(gradient.flatten()[: weight.data.numel()].clone())
            return gradients
        finally:
            engine.optimizer.zero_grad()
            engine.set_gradient_accumulation_boundary(boundary)

    @contextmanager
    def step_afterwards(self) -> Iterator[None]:
        engine = self._engine
        steps = []
        engine.step = lambda *args, **kwargs: steps.append((args, kwargs))
        try:
            yield
        finally:
            del engine.step
        for args, kwargs in steps:
            engine.step(*args, **kwargs)

    @property
    def _engine(self) -> Any:
        wrapped = self._accelerator.deepspeed_engine_wrapped
        return wrapped.engine if wrapped is not None else None

    @property
    def _stage(self) -> int:
        stage: int = self._accelerator.state.deepspeed_plugin.zero_stage
        return stage

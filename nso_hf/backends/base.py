"""What the rest of the library asks of a back end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nso_hf.backends.errors import adds_gradients, steps_on_copies, without_moments

HOOKS = {
    "deepspeed",
    "torch.distributed",
    "torch.nn.parallel",
    "transformers.distributed",
    "transformers.trainer",
}
"""Modules whose hooks on a gradient reduce it, and do not step an optimizer."""


@dataclass(frozen=True)
class Weight:
    """The part of one parameter that this process holds.

    `data` is written in place and outside autograd. Its elements are those at the positions
    `start`, `start` + 1, ... of the whole parameter, which has the shape `shape` and is flattened
    in row-major order; `index` numbers the parameters of the model, frozen ones included, in the
    order of `named_parameters()`.
    """

    name: str
    index: int
    parameter: nn.Parameter
    data: Tensor
    start: int
    shape: torch.Size
    copies: int = 1
    """Processes that hold this same part."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()


class Backend(ABC):
    """How one kind of run holds the weights of one model and reduces their gradients."""

    keeps_gradients_apart: ClassVar[bool] = True
    """Whether a pass can have a gradient of its own: see `apart`."""
    steps_on_copies: ClassVar[bool] = False
    """Whether the optimizer steps, inside the backward pass, on weights of its own."""
    stays: ClassVar[bool] = False
    """Whether weights stay where they are from one optimizer step to the next."""
    name: str
    """For people: what to write into a report."""
    num_processes: int
    process_index: int
    num_copies: int
    """Copies of the weights, which can be at different points at the same time. Processes that
    share one copy between them are at one point, with micro-batches of their own."""
    copy: int
    """The number of this process's copy, 0 to `num_copies` - 1."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._accelerator = accelerator
        self._model = model  # wrapped, once training has begun
        self.num_processes = self.num_copies = accelerator.num_processes
        self.process_index = self.copy = accelerator.process_index

    @property
    def part(self) -> int:
        """Which part of its copy of the weights this process holds, counted from 0."""
        return self.process_index % max(1, self.num_processes // self.num_copies)

    def weights(self, beside: Iterable[tuple[str, nn.Parameter]] = ()) -> list[Weight]:
        """Every parameter of the model, tied ones once, as this process holds it, and those
        `beside` it, as of a loss."""
        named = (*self.module.named_parameters(), *beside)
        weights = [
            self._held(_as_written(name), index, parameter)
            for index, (name, parameter) in enumerate(named)
        ]
        self._parameters = [weight.parameter for weight in weights]
        return weights

    def optimised(self, optimizer: Any) -> set[int]:
        """The ids of the parameters that an optimizer of Accelerate's updates."""
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    def _held(self, name: str, index: int, parameter: nn.Parameter) -> Weight:
        """The part of one parameter that this process holds: here, all of it."""
        shape = parameter.shape
        return Weight(name, index, parameter, parameter.data, 0, shape, self.num_processes)

    @abstractmethod
    def discard_gathered(self) -> None:
        """Before the weights are written: drop what was gathered of them for an earlier forward
        pass, so that the next one gathers what is written."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes of `values`. Those summed over the weights of a process, each
        divided by its `copies`, give the sum over the whole model."""
        total: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "sum")
        return total

    @abstractmethod
    def _without_reduction(self, is_first: bool) -> AbstractContextManager[None]:
        """See `accumulate_only`."""

    @contextmanager
    def accumulate_only(self, is_first: bool) -> Iterator[None]:
        """Inside, a backward pass adds to the gradients, and another will follow before the
        optimizer steps: gradients are reduced between processes only where it would take more
        memory to put it off. `is_first` says whether this is the step's first micro-batch."""
        state = self._accelerator.gradient_state
        sync = state.sync_gradients
        with self._without_reduction(is_first):
            state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(sync)

    def check_keeps_gradients_apart(self, method: str) -> None:
        """Raise a `ValueError` if a pass cannot have a gradient of its own."""
        if not self.keeps_gradients_apart:
            raise adds_gradients(method, f"{self.name} adds every gradient to those before it")

    @contextmanager
    def apart(
        self, weights: Sequence[Weight], receive: Callable[[list[Tensor]], float]
    ) -> Iterator[None]:
        """Inside, a backward pass has a gradient of its own, the mean over the processes that share
        one copy of the weights. `receive` is given of each of the `weights` the part of it that
        this process holds, and says by what the gradient is multiplied and added to every `.grad`;
        what it was given it may write to afterwards."""
        kept = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        state = self._accelerator.gradient_state
        sync = state.sync_gradients
        try:
            with self._reduced_apart():
                state._set_sync_gradients(False)
                try:
                    yield
                finally:
                    state._set_sync_gradients(sync)
            factor = receive([self._gradient_of(weight) for weight in weights])
            if factor:
                own = [parameter.grad for parameter in self._parameters]
                kept = [_sum(before, factor, now) for before, now in zip(kept, own, strict=True)]
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient

    def _reduced_apart(self) -> AbstractContextManager[None]:
        """Inside, a backward pass reduces its gradient among those who share a copy, and no
        other."""
        return self._without_reduction(is_first=False)

    def _gradient_of(self, weight: Weight) -> Tensor:
        """The part of its `.grad` that this process holds, to be read or written."""
        gradient = weight.parameter.grad
        return torch.zeros_like(weight.data) if gradient is None else gradient

    def check_steps_on_weights(self, option: str, value: object) -> None:
        """Raise a `ValueError` if what is written to weights or gradients, before or after a step,
        is lost."""
        if self.steps_on_copies:
            raise steps_on_copies(option, value, self.name)

    def gradients(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Of each `.grad` the part that this process holds, to be read or written: zeros where
        there was none."""
        for weight in weights:
            if weight.parameter.grad is None:
                weight.parameter.grad = torch.zeros_like(weight.parameter)
        return [self._own_part(weight.parameter.grad) for weight in weights]

    def first_moments(self, optimizer: Any, weights: Sequence[Weight]) -> list[Tensor]:
        """The optimizer's moving average of the gradient, of each weight the part that this process
        holds: zeros before its first step.

        Raises:
            ValueError: it keeps none.
        """
        parts = []
        for weight in weights:
            state = optimizer.state.get(weight.parameter, {})
            moment = next((state[key] for key in _MOMENTS if state.get(key) is not None), None)
            if moment is None and state:
                raise without_moments(optimizer)
            parts.append(
                torch.zeros_like(weight.data) if moment is None else self._own_part(moment)
            )
        return parts

    def _own_part(self, tensor: Tensor | None) -> Tensor:
        """The part that this process holds of a tensor that is kept as its parameter is."""
        assert tensor is not None
        return tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        mean: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "mean")
        return mean

    def abandon(self) -> None:  # noqa: B027
        """After a pass that an exception cut off: forget it, so that the weights can be written."""

    def holds(self, weights: Sequence[Weight]) -> bool:
        """Whether the model still keeps its weights there: somebody may have set `.data`."""
        return True

    def share_buffers(self) -> None:  # noqa: B027
        """Before the first of several passes: what its forward pass would do to make the buffers
        of all processes the same, so that they are put back to that."""

    @abstractmethod
    def check_prepared(self) -> None:
        """Raise a `ValueError` if the model is about to be trained without what joins the
        processes."""

    @property
    def differentiates_twice(self) -> bool:
        """Whether `gradient` could be differentiated again: the weights are whole."""
        return True

    @cached_property
    def module(self) -> nn.Module:
        """The model as its author wrote it, to be called for a loss that is measured, not trained
        on."""
        module: nn.Module = self._accelerator.unwrap_model(self._model, keep_torch_compile=False)
        return module

    @contextmanager
    def at_full_precision(self) -> Iterator[None]:
        """Inside, `module` computes in the type its weights are stored in."""
        module = vars(self.module)
        cast, original = module.get("forward"), module.get("_original_forward")
        if cast is not None and original is not None:  # Accelerate's mixed precision
            module["forward"] = original
        try:
            with torch.autocast(self._accelerator.device.type, enabled=False):
                yield
        finally:
            if cast is not None:
                module["forward"] = cast

    def gradient(self, loss: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        """The gradient of the sum over processes of `loss`: of each weight the part that this
        process holds, in the shape of its `data`. Every `.grad` stays as it was."""
        parameters = [weight.parameter for weight in weights]
        return self.summed(torch.autograd.grad(loss, parameters, materialize_grads=True))

    def average_copies(self, tensors: Sequence[Tensor]) -> None:  # noqa: B027
        """Give tensors that differ between copies of the weights their mean, in place."""

    def whole(self, weight: Weight) -> Tensor:
        """The whole of a weight that may be sharded: on every process, and to be read alone."""
        return weight.data

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over processes of whole tensors that differ between them."""
        if self.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
        return list(tensors)

    def step_afterwards(self) -> AbstractContextManager[None]:
        """An optimizer that steps by itself in the last backward pass waits for the end of this
        context, when the weights are back in their place."""
        return nullcontext()


_MOMENTS = ("momentum_buffer", "exp_avg")
"""What optimizers call it."""


def _sum(a: Tensor | None, weight: float, b: Tensor | None) -> Tensor | None:
    """a + weight b, in place where it can be; None stands for no gradient."""
    if a is None or b is None:
        return a if b is None else b * weight
    return a.add_(b, alpha=weight)


def _as_written(name: str) -> str:
    """The name of a parameter in the model as its author wrote it, without what compilation and
    activation checkpointing of single layers put in between."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")

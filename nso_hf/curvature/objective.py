"""The function whose curvature is measured: the mean loss of a model over some batches."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm
from transformers import Trainer

from nso_hf.backends import Backend, alone, select
from nso_hf.curvature.batches import Batch, examples_of, training_batches
from nso_hf.curvature.parameters import Selection, left_out, select_measured
from nso_hf.curvature.vectors import Vectors
from nso_hf.refusal import refusal
from nso_hf.step.counts import counts_kept
from nso_hf.step.generators import generators_of
from nso_hf.step.perturbation import Perturbation, borrowed
from nso_hf.step.side_effects import Buffers, copied, random_state_kept

_DIFFERENCE = 1e-4  # relative, between two losses at the same weights: rounding is far below


class Objective:
    """f(W) = sum_b n_b f_b(W) / sum_b n_b over batches b of n_b examples: the loss of the model in
    evaluation mode, as the Trainer's `evaluate` averages it.

    With a model, this process works alone. With a Trainer, f is its `compute_loss`, and all of its
    processes have to take part: each gets the same `batches`, and every so manieth of them is its
    to evaluate; or, unless `shared`, all of them evaluate each. One batch of each process makes a
    round. Weights in half precision, which round the loss, are measured only if `in_half`.

    Raises:
        ValueError: there are no batches, the model returns no loss for them, or `params` does not
            fit the model.
    """

    def __init__(
        self,
        model: nn.Module | Trainer,
        batches: Iterable[Batch] | None,
        params: Selection = "trainable",
        shared: bool = True,
        in_half: bool = False,
    ) -> None:
        self._trainer = model if isinstance(model, Trainer) else None
        self.backend: Backend
        if isinstance(model, Trainer):
            wrapped = model.model_wrapped if model.model_wrapped is not None else model.model
            self.backend = select(model.accelerator, wrapped)
            if not self.backend.differentiates_twice:
                self.backend.check_prepared()
            batches = training_batches(model) if batches is None else batches
        else:
            self.backend = alone(model)
        if batches is None:
            raise refusal("batches", None, "a model brings no data", "Pass batches, or a Trainer")
        self._model = self.backend.module
        self.all_weights = all_weights = self.backend.weights()
        can_unfreeze = self.backend.differentiates_twice
        self.weights = select_measured(all_weights, self._model, params, can_unfreeze, in_half)
        self.vectors = Vectors(self.weights, self.backend)
        self._every = [weight.parameter for weight in all_weights]
        self._deal(batches, shared)
        self.notes = (*self._notes(), *left_out(all_weights, self._model, params))

    def _deal(self, batches: Iterable[Batch], shared: bool) -> None:
        """Keep the batches that are this process's, and how much each of them weighs."""
        if isinstance(batches, Mapping):
            raise refusal("batches", "a dict", "must be an iterable of dicts", "Write [batch]")
        processes = self.backend.num_processes if shared else 1
        mine = self.backend.process_index if shared else 0
        every = list(batches)
        if not every:
            raise refusal("batches", every, "there is no batch", "Pass at least one")
        for batch in every:
            if not isinstance(batch, Mapping):
                rule, cure = "must be a dict of what the model takes", "Write {'input_ids': ...}"
                raise refusal("batches", type(batch).__name__, rule, cure)
        sizes = [examples_of(batch) for batch in every]
        self.num_batches, self.num_examples = len(every), sum(sizes)
        self.weights_of_batches = [size / self.num_examples for size in sizes]
        self.num_rounds = -(-len(every) // processes)
        self._batches, self._shares = [], []
        for number in range(mine, self.num_rounds * processes, processes):
            counts = number < len(every)  # in the last round there may be none: it weighs nothing
            self._batches.append(every[number] if counts else every[0])
            self._shares.append(sizes[number] / self.num_examples if counts else 0.0)
        if not shared:  # all processes evaluate the same
            self._shares = [share / self.backend.num_processes for share in self._shares]

    def _notes(self) -> tuple[str, ...]:
        random = {
            type(module).__name__
            for module in self._model.modules()
            if (isinstance(module, _DropoutNd) and module.p > 0) or isinstance(module, _BatchNorm)
        }
        return (f"{', '.join(sorted(random))} in evaluation mode",) if random else ()

    @contextmanager
    def opened(self) -> Iterator[Perturbation]:
        """Everything as measuring needs it, the weights free to move; all as it was afterwards:
        weights, gradients, buffers, modes of the modules, random state.

        Raises:
            ValueError: the loss is random.
        """
        devices = {self.vectors.device, *(parameter.device for parameter in self._every)}
        generators = generators_of(self._model, self._trainer)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(random_state_kept(devices, generators))
            stack.enter_context(_in_evaluation_mode(self._model))
            stack.enter_context(Buffers(self._model).kept())
            if self._trainer is not None:
                stack.enter_context(counts_kept(self._trainer))
            if self.backend.differentiates_twice:
                wanted = {weight.index for weight in self.weights}
                stack.enter_context(_requiring_gradients(self._every, wanted))
                stack.enter_context(_gradients_put_aside(self._every))
            stack.enter_context(self.backend.at_full_precision())
            self._check_loss()
            yield stack.enter_context(borrowed(self.weights, self.backend))

    def _check_loss(self) -> None:
        self._is_differentiated_inside = False
        first = self._value(0)
        try:
            with torch.no_grad():
                second = self._value(0)
        except RuntimeError:  # of torch.autograd.grad within it
            second = torch.full_like(first, math.nan)
        if not torch.isclose(first, second, rtol=_DIFFERENCE, atol=0.0, equal_nan=False):
            self._is_differentiated_inside = True
            second = self._value(0)
        self.backend.discard_gathered()
        losses = self.losses()
        if not losses.isfinite().all():
            number = int((~losses.isfinite()).nonzero()[0])
            rule = f"the loss is not finite in round {number} of {self.num_rounds}"
            raise refusal("batches", losses[number].item(), rule, "Check the data and the weights")
        if (first - second).abs() > _DIFFERENCE * first.abs():
            rule = f"its loss is random ({first:.6g}, then {second:.6g}) in evaluation mode too"
            cure = "Switch off what draws random numbers in its forward pass"
            raise refusal("model", type(self._model).__name__, rule, cure)

    def check_gradient(self) -> None:
        """
        Raises:
            ValueError: the gradient of the loss does not reach the weights by autograd alone.
        """
        if not self.backend.differentiates_twice:  # there, `backward` is what gives the gradient
            return
        loss = self.differentiable_loss(0)
        selected = [weight.parameter for weight in self.weights]
        parts = torch.autograd.grad(loss, selected, allow_unused=True)
        own = {id(parameter) for parameter in self._every}
        ends = [node.variable for node in graph_of(loss) if hasattr(node, "variable")]
        by_hook = any(parameter.grad is not None for parameter in self._every) or any(
            end._backward_hooks for end in ends if id(end) not in own
        )
        if by_hook or all(part is None for part in parts):
            rule = "its loss hands its gradient to the weights by a hook, as cached losses do"
            if not by_hook:
                rule = "no gradient of its loss reaches the selected weights"
            cure = "Measure the loss without the cache, or noise_stability, which takes none"
            raise refusal("model", type(self._model).__name__, rule, cure)

    def _value(self, number: int) -> Tensor:
        return self.loss(number).detach()

    def loss(self, number: int) -> Tensor:
        """f_b of this process's batch of round `number`, a scalar."""
        # Each evaluation gets a copy: models write into what they are given.
        batch = send_to_device(copied(dict(self._batches[number])), self.vectors.device)
        loss: object
        if self._trainer is not None:
            loss = self._trainer.compute_loss(self._model, batch)
        else:
            output = self._model(**batch)
            is_dict = isinstance(output, Mapping)
            loss = output.get("loss") if is_dict else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            names = sorted(self._batches[number])
            rule = f"{type(self._model).__name__} returns no scalar loss for them"
            raise refusal("batches", names, rule, "Add labels to them")
        return loss.squeeze()

    def share_of_loss(self, number: int) -> Tensor:
        """Its part of f: the sum over rounds and processes is f(W)."""
        return self.loss(number) * self._shares[number]

    def differentiable_loss(self, number: int) -> Tensor:
        """`share_of_loss`, to be differentiated.

        Raises:
            ValueError: it does not depend on the selected weights.
        """
        loss = self.share_of_loss(number)
        if not loss.requires_grad:
            names = [weight.name for weight in self.weights[:3]]
            rule = "the loss depends on none of the selected weights"
            raise refusal("params", names, rule, "Select weights that the model uses")
        return loss

    def losses(self) -> Tensor:
        """The parts of f at the present weights, summed over processes: float64, one a round."""
        with torch.set_grad_enabled(self._is_differentiated_inside):
            parts = torch.stack(
                [self.share_of_loss(r).detach().double() for r in range(self.num_rounds)]
            )
        return self.backend.summed([parts])[0].cpu()

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator["tqdm[Any]"]:
        """A bar that shows after a few seconds, in one process; None: the end is not known."""
        hidden = self.backend.process_index > 0
        with tqdm(total=total, desc=description, delay=3, leave=False, disable=hidden) as bar:
            yield bar


def graph_of(loss: Tensor) -> Iterator[Any]:
    """Every node of the graph of its gradient."""
    seen: set[Any] = {None}
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _gradients_put_aside(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside there are none; what is left behind is dropped."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@contextmanager
def _requiring_gradients(parameters: list[nn.Parameter], wanted: set[int]) -> Iterator[None]:
    """Inside, exactly the parameters of these numbers require a gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(index in wanted)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)

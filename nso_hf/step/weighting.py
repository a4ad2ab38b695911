"""Gradients that are added with a weight, before the optimizer steps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from nso_hf.backends import HOOKS
from nso_hf.refusal import refusal


@contextmanager
def weighted_backward(
    accelerator: Accelerator,
    weight: float,
    trainer: type,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Inside, `accelerator.backward` adds a `penalty` to the loss, multiplies it by `weight`, and
    does nothing at 0; the loss itself stays as it is.

    Raises:
        ValueError: the `trainer` has differentiated its loss without it, or not at all.
    """
    own = vars(accelerator).get("backward")
    backward = accelerator.backward
    was_called = False

    def weighted(loss: Tensor, **kwargs: Any) -> None:
        nonlocal was_called
        was_called = True
        if weight:
            objective = loss if penalty is None else loss + penalty(loss)
            backward(objective if weight == 1 else objective * weight, **kwargs)

    accelerator.backward = weighted
    try:
        yield
    finally:
        if own is None:
            del accelerator.backward
        else:
            accelerator.backward = own
    if (weight != 1 or penalty is not None) and not was_called:
        rule = "it does not call accelerator.backward, so its gradient cannot be weighted"
        cure = "Write self.accelerator.backward(loss) for loss.backward() in it"
        raise refusal("training_step", trainer.__qualname__, rule, cure)


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, whatever the Trainer's step asks of it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train
        for module, mode in modes:
            module.training = mode


def check_steps_afterwards(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """
    Raises:
        ValueError: a hook on the gradient of a parameter may step an optimizer in the backward
            pass: its update would be undone with the displacement.
    """
    for name, parameter in parameters:
        hooks = list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
        foreign = [hook for hook in hooks if not _is_of(HOOKS, getattr(hook, "__module__", ""))]
        if foreign or hasattr(parameter, "_in_backward_optimizers"):
            hook = getattr(foreign[0], "__qualname__", foreign[0]) if foreign else "optimizer"
            rule = f"{hook}, a hook on its gradient, would update it while it is displaced"
            cure = "Use an optimizer that steps after the backward pass, as adamw_torch"
            raise refusal("parameter", name, rule, cure)


def _is_of(packages: Iterable[str], module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)

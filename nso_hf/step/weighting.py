"""Gradients that are added with a weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from nso_hf.refusal import refusal


@contextmanager
def weighted_backward(accelerator: Accelerator, weight: float, trainer: type) -> Iterator[None]:
    """Inside, `accelerator.backward` multiplies the loss by `weight`, and does nothing at 0; the
    loss itself stays as it is.

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
            backward(loss if weight == 1 else loss * weight, **kwargs)

    accelerator.backward = weighted
    try:
        yield
    finally:
        if own is None:
            del accelerator.backward
        else:
            accelerator.backward = own
    if weight != 1 and not was_called:
        rule = "it does not call accelerator.backward, so its gradient cannot be weighted"
        cure = "Write self.accelerator.backward(loss) for loss.backward() in it"
        raise refusal("training_step", trainer.__qualname__, rule, cure)

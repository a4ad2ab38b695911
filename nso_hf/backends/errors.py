"""What several back ends refuse."""

from typing import Any

from torch import nn

from nso_hf.refusal import Refusal, refusal


def adds_gradients(method: str, how: str) -> Refusal:
    """The error for a method that takes gradients into its own hands where it cannot."""
    rule = f"{how}, and this method needs that of each pass"
    cure = "Use DistributedDataParallel without a static graph, FSDP2, or method='nso'"
    return refusal("method", method, rule, cure)


def without_moments(optimizer: Any) -> Refusal:
    """The error for an optimizer whose moving average of the gradient is asked for."""
    rule = "it keeps no moving average of the gradient"
    cure = "Use adamw_torch, or sgd with optim_args='momentum=0.9'"
    return refusal("optim", type(optimizer).__name__, rule, cure)


def not_prepared(model: nn.Module, how: str) -> Refusal:
    """The error for a model that Accelerate has not wrapped for training, or no longer holds."""
    rule = f"it is not {how}, as after evaluate(), and each process would train a model of its own"
    cure = "Make a new trainer, and evaluate after train() or in a callback's on_train_begin"
    return refusal("model", type(model).__name__, rule, cure)


def steps_on_copies(option: str, value: object, name: str) -> Refusal:
    """The error for what writes to weights or gradients where that would be lost."""
    rule = f"{name} steps on copies of the weights, inside the backward pass"
    cure = "Use DistributedDataParallel or FSDP2, or weight_decay"
    return refusal(option, value, rule, cure)

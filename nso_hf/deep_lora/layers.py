"""Layers of peft's LoRA, and more than two factors in them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Name -> layer that the adapter is in."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def deep_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Those whose `lora_B` is a product."""
    return {
        name: layer
        for name, layer in lora_layers(model, adapter).items()
        if adapter in layer.lora_B and parametrize.is_parametrized(layer.lora_B[adapter], "weight")
    }


def hold(
    layer: Any, adapter: str, right: Tensor, left: Sequence[Tensor], share: float | None
) -> None:
    """Put factors into a layer: `right` into `lora_A`, the product of `left` into `lora_B`. `right`
    and the first of `left` are trained at `share` of the learning rate, or like the others."""
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    with torch.no_grad():
        A.weight.copy_(right)
        B.weight.copy_(left[0])
    for core in left[1:]:
        times = Times(core.to(B.weight, copy=True))
        times.requires_grad_(A.weight.requires_grad)
        parametrize.register_parametrization(B, "weight", times)
    if share is not None:
        A.learning_rate_share = B.parametrizations.weight.learning_rate_share = float(share)


class Times(nn.Module):
    """One more factor of a weight, on its right. Not rounded under autocast: the product is the
    weight that will be saved."""

    def __init__(self, core: Tensor) -> None:
        super().__init__()
        self.core = nn.Parameter(core)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight @ self.core

"""Layers that LoRA adapts, as peft holds them: W0 + s B A."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nso_hf.backends import Backend, Weight
from nso_hf.refusal import refusal


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with its active adapters.

    `base` is W0, of shape (outputs, inputs), or (inputs, outputs) where it is `transposed`; of each
    adapter there are A (r, inputs), the factors of B (outputs, r), in ordinary LoRA one, and its
    scale s.
    """

    base: Weight
    adapters: Sequence[tuple[Weight, Sequence[Weight], float]]
    transposed: bool

    @property
    def inputs(self) -> int:
        return self.base.shape[0 if self.transposed else 1]

    def squared_norms(self, backend: Backend) -> Tensor:
        """For each output, the share of this process in the squared norm of its row of W0 + s B A:
        float32, shape (outputs,)."""
        outputs, width = self.base.shape[1 if self.transposed else 0], self.base.shape[1]
        if self.base.data.numel() == 0:
            return torch.zeros(outputs, device=self.base.data.device)
        first, before = divmod(self.base.start, width)
        flat = self.base.data.reshape(-1).float()
        rows = -(-(before + flat.numel()) // width)
        merged = torch.zeros(rows * width, device=flat.device)
        merged[before : before + flat.numel()] = flat
        held = torch.zeros_like(merged, dtype=torch.bool)
        held[before : before + flat.numel()] = True
        merged = merged.view(rows, width)
        for A, factors, scale in self.adapters:
            B = [backend.whole(factor).float() for factor in factors]
            left, right = reduce(torch.matmul, B), backend.whole(A).float()
            if self.transposed:
                left, right = right.T, left.T
            merged.addmm_(left[first : first + rows], right, alpha=scale)
        squares = merged.square() * held.view(rows, width)
        if self.transposed:
            return squares.sum(dim=0) / self.base.copies
        sums = torch.zeros(outputs, device=flat.device)
        sums[first : first + rows] = squares.sum(dim=1)
        return sums / self.base.copies


def adapted_layers(model: nn.Module, weights: Sequence[Weight]) -> list[AdaptedLayer]:
    """The linear layers of a model that have an active LoRA adapter.

    Raises:
        ValueError: the base of one is quantised, merged with its adapter, or of another kind.
    """
    lora: Any = sys.modules.get("peft.tuners.lora")
    if lora is None:
        return []
    by_parameter = {id(weight.parameter): weight for weight in weights}

    def held(parameters: Iterable[nn.Parameter]) -> list[Weight]:
        return [by_parameter[id(parameter)] for parameter in parameters]

    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        active = [each for each in module.active_adapters if each in module.lora_A]
        if not active:
            continue
        parameter: Any = module.get_base_layer().weight
        if not parameter.is_floating_point():
            rule = f"it is quantised ({parameter.dtype}), and cannot carry noise"
            raise refusal("weight", f"{name}.weight", rule, "Load the base model unquantised")
        if module.merged or any(module.use_dora.get(each) for each in active):
            rule = "its adapter is merged into it, or is one of DoRA"
            raise refusal("weight", f"{name}.weight", rule, "Train LoRA beside unmerged weights")
        if len(by_parameter[id(parameter)].shape) != 2:
            continue
        adapters = [
            (
                by_parameter[id(module.lora_A[each].weight)],
                [B for B in held(module.lora_B[each].parameters()) if len(B.shape) == 2],
                float(module.scaling[each]),
            )
            for each in active
        ]
        transposed = bool(getattr(module, "fan_in_fan_out", False))
        layers.append(AdaptedLayer(by_parameter[id(parameter)], adapters, transposed))
    return layers

"""Which weights curvature is measured in."""

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nso_hf.backends import Weight
from nso_hf.refusal import refusal

_LINEAR = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)

Selection = str | Sequence[str]
"""The name of a preset, or regular expressions searched for in the names of all parameters."""


def _trainable(model: nn.Module) -> Iterable[Tensor]:
    return (p for p in model.parameters() if p.requires_grad)


def _all(model: nn.Module) -> Iterable[Tensor]:
    return model.parameters()


def _lora(model: nn.Module) -> Iterable[Tensor]:
    return (p for name, p in model.named_parameters() if re.search(r"\blora_", name))


def _merged(model: nn.Module) -> Iterable[Tensor]:
    # In W = W0 + s B A the derivatives by W are those by W0: nothing needs to be merged.
    adapted = (m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer"))
    return (module.get_base_layer().weight for module in adapted)  # type: ignore[operator]


def _weight_matrices(model: nn.Module) -> Iterable[Tensor]:
    linear = (module for module in model.modules() if isinstance(module, _LINEAR))
    return (module.weight for module in linear if module.weight.requires_grad)


PRESETS: dict[str, Callable[[nn.Module], Iterable[Tensor]]] = {
    "trainable": _trainable,
    "all": _all,
    "lora": _lora,
    "merged": _merged,
    "weight_matrices": _weight_matrices,
}
"""Name -> the parameters of a model it stands for: those that are trained; every one, frozen ones
too; LoRA adapters; the weights that LoRA adapters are merged into; the trained weights of linear
and convolution layers (the selection of arXiv 2306.08553)."""


def select_measured(
    weights: Sequence[Weight], model: nn.Module, params: Selection, can_unfreeze: bool
) -> list[Weight]:
    """Those among all `weights` of `model` that `params` stands for.

    Raises:
        ValueError: `params` is unknown or stands for no weight, or a weight cannot be
            differentiated by.
    """
    if isinstance(params, str):
        if params not in PRESETS:
            choices = ", ".join(map(repr, PRESETS))
            cure = f"Use one of {choices}, or a list of regular expressions"
            raise refusal("params", params, "unknown", cure)
        chosen = {id(parameter) for parameter in PRESETS[params](model)}
        selected = [weight for weight in weights if id(weight.parameter) in chosen]
    else:
        for pattern in params:
            try:
                re.compile(pattern)
            except re.error as error:
                rule = f"not a regular expression ({error})"
                raise refusal("params", pattern, rule, "Escape special characters") from error
            if not any(re.search(pattern, weight.name) for weight in weights):
                names = ", ".join(weight.name for weight in weights[:3])
                cure = f"Use part of a parameter's name, such as {names}"
                raise refusal("params", pattern, "matches no parameter", cure)
        selected = [w for w in weights if any(re.search(p, w.name) for p in params)]
    if not selected:
        cure = "Use 'all' for every parameter of the model, or patterns"
        raise refusal("params", params, "no parameter of this model is one of them", cure)
    for weight in selected:
        if not can_unfreeze and not weight.parameter.requires_grad:
            rule = f"{weight.name} is frozen, and sharded weights have no gradient while they are"
            raise refusal("params", params, rule, "Measure it in one process, or what is trained")
    for weight in weights:  # the others too: they decide what a forward pass computes in
        if weight.data.dtype not in (torch.float32, torch.float64):
            rule = f"{weight.data.dtype} rounds the loss and its gradient by more than they change"
            raise refusal("parameter", weight.name, rule, "Load the model in float32")
    return selected

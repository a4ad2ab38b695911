"""Which weights curvature is measured in."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nso_hf.backends import Weight
from nso_hf.refusal import refusal
from nso_hf.step.selection import SelectionOptions, select_perturbed
from nso_hf.step.storage import without_aliases

_LINEAR = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_PRECISE, _HALF = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
_NO_MATRIX = re.compile(r"embed|position|token", re.IGNORECASE)

Selection = str | Sequence[str]
"""The name of a preset, or regular expressions searched for in the names of all parameters."""


def _trainable(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    return [weight for weight in weights if weight.parameter.requires_grad]


def _perturbed(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    return select_perturbed(weights, SelectionOptions())


def _all(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    return list(weights)


def _lora(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    return [weight for weight in weights if re.search(r"\blora_", weight.name)]


def _merged(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    # In W = W0 + s B A the derivatives by W are those by W0: nothing needs to be merged.
    bases = {id(_adapted(name, module, model)) for name, module in model.named_modules()}
    return [weight for weight in weights if id(weight.parameter) in bases]


def _adapted(name: str, module: nn.Module, model: nn.Module) -> Tensor | None:
    """The weight that the adapter of a module is added to, if it has one.

    Raises:
        ValueError: the derivatives by it are not those by the merged weight.
    """
    if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
        return None
    layer: Any = module
    base, attribute = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    weight: Tensor | None = getattr(base, attribute, None)
    variant = next(iter(getattr(layer, "lora_variant", {}).values()), None)
    if weight is None or variant is not None:
        kind = type(base if variant is None else variant).__name__
        rule = f"the adapter of {name} ({kind}) does not add to one weight W0 as W = W0 + s B A"
        raise refusal("params", "merged", rule, "Merge the adapters (merge_and_unload), or 'lora'")
    holders = [other for other in model.modules() if any(p is weight for p in _own(other))]
    if len(holders) > 1:
        rule = f"the weight under the adapter of {name} is tied to another, which stays W0"
        cure = "Untie them (give one a copy of the weight), or use 'lora'"
        raise refusal("params", "merged", rule, cure)
    return weight


def _own(module: nn.Module) -> Iterable[Tensor]:
    return module.parameters(recurse=False)


def _weight_matrices(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    linear = {id(module.weight) for module in model.modules() if isinstance(module, _LINEAR)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, _TABLES)}
    return [
        weight
        for weight in _trainable(weights, model)
        if id(weight.parameter) in linear
        or (
            len(weight.shape) >= 2
            and id(weight.parameter) not in tables
            and not _NO_MATRIX.search(weight.name.rpartition(".")[2])
        )
    ]


PRESETS: dict[str, Callable[[Sequence[Weight], nn.Module], list[Weight]]] = {
    "trainable": _trainable,
    "perturbed": _perturbed,
    "all": _all,
    "lora": _lora,
    "merged": _merged,
    "weight_matrices": _weight_matrices,
}
"""Name -> the weights of a model it stands for: those that are trained; of those, what NSO perturbs
by default, which leaves out single numbers such as a temperature; every one, frozen ones too; LoRA
adapters; the weights that LoRA adapters are merged into; the trained weights of two or more
dimensions (linear and convolution layers, experts, routers, recurrent layers), but for embeddings
(the selection of arXiv 2306.08553)."""


def add_params_option(parser: argparse.ArgumentParser, default: str = "trainable") -> None:
    """`--params`, which `params_of` reads."""
    parser.add_argument(
        "--params",
        nargs="+",
        default=[default],
        metavar="NAME",
        help=f"weights: {', '.join(PRESETS)}, or regular expressions (default: {default})",
    )


def params_of(options: argparse.Namespace) -> Selection:
    """The name of a preset, or the patterns."""
    names: list[str] = options.params
    return names[0] if len(names) == 1 and names[0] in PRESETS else names


def left_out(weights: Sequence[Weight], model: nn.Module, params: Selection) -> tuple[str, ...]:
    """A note that names what of two or more dimensions "weight_matrices" leaves out."""
    if params != "weight_matrices":
        return ()
    chosen = {weight.index for weight in _weight_matrices(weights, model)}
    names = [
        weight.name
        for weight in _trainable(weights, model)
        if len(weight.shape) >= 2 and weight.index not in chosen
    ]
    return (f"embeddings are left out of weight_matrices: {', '.join(names)}",) if names else ()


def select_measured(
    weights: Sequence[Weight],
    model: nn.Module,
    params: Selection,
    can_unfreeze: bool,
    in_half: bool = False,
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
        selected = PRESETS[params](weights, model)
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
        if weight.data.dtype not in _PRECISE + (_HALF if in_half else ()):
            rule = f"{weight.data.dtype} rounds the loss and its gradient by more than they change"
            raise refusal("parameter", weight.name, rule, "Load the model in float32")
    kept = {weight.index for weight in without_aliases(weights)}
    for weight in weights:
        if weight.index not in kept:
            rule = (
                "it lies over the memory of another: derivatives by one would miss the other's part"
            )
            cure = "Make them one parameter, b.weight = a.weight"
            raise refusal("parameter", weight.name, rule, cure)
    return selected

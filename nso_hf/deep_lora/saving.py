"""What is saved of a deep LoRA: an ordinary LoRA that needs nothing of this library, and its
factors in a file beside it, to be trained on."""

from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nso_hf.deep_lora.layers import deep_layers, hold, lora_layers
from nso_hf.refusal import needs, refusal

FACTORS_FILE = "deep_lora.safetensors"

_HELD = ".parametrizations.weight."  # what PyTorch puts between a module and a weight's factors


class SavesFactors:
    """Of a `PeftModel`. It leaves `state_dict` alone, which back ends shard and gather."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        model: Any = self
        parent: Any = super()
        given = kwargs.pop("state_dict", None)
        state = model.state_dict() if given is None else given
        parent.save_pretrained(save_directory, *args, state_dict=multiplied(state), **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
            if layers := deep_layers(model, adapter):
                held, named = f".lora_B.{adapter}{_HELD}", f".lora_B{_HELD}"
                factors = {
                    name.replace(held, named): value.contiguous()
                    for name, value in state.items()
                    if held in name
                }
                folder = Path(save_directory) / ("" if adapter == "default" else adapter)
                A = next(iter(layers.values())).lora_A[adapter]
                gamma = str(getattr(A, "learning_rate_share", ""))
                save_file(factors, folder / FACTORS_FILE, {"format": "pt", "gamma": gamma})

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        model: Any = self
        layers = deep_layers(model, adapter_name)
        if not layers:
            return parent.load_adapter(model_id, adapter_name, *args, **kwargs)
        saved, _ = saved_factors(model_id)
        held = {name: list(x.lora_B[adapter_name].parameters()) for name, x in layers.items()}
        if _shapes(saved) != _shapes(held):
            rule = f"its {FACTORS_FILE} is of other adapters than this model's"
            raise refusal("model_id", str(model_id), rule, "Make them as they were made there")
        result = parent.load_adapter(model_id, adapter_name, *args, **kwargs)
        for name, factors in held.items():
            for factor, value in zip(factors, saved[name], strict=True):
                factor.data.copy_(value)
        result.missing_keys[:] = [key for key in result.missing_keys if _HELD not in key]
        return result


def saves_factors(model: Any) -> Any:
    """The `PeftModel` itself, of a class that does."""
    if not isinstance(model, SavesFactors):
        model.__class__ = type(type(model).__name__, (SavesFactors, type(model)), {})
    return model


def load_deep_lora(model: nn.Module, folder: str | Path) -> Any:
    """The base `model` with the deep LoRA that was saved in `folder`, to be trained on. (For any
    other use peft's `PeftModel.from_pretrained` gives an ordinary LoRA that computes the same.)

    Raises:
        ValueError: no deep LoRA was saved there.
    """
    needs("Deep LoRA", "recipes", "peft")
    from peft import PeftModel

    saved, gamma = saved_factors(folder)
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    for name, layer in lora_layers(adapted, "default").items():
        hold(layer, "default", layer.lora_A["default"].weight, saved[name], gamma)
    return saves_factors(adapted)


def saved_factors(folder: str | Path) -> tuple[dict[str, list[Tensor]], float | None]:
    """Those of `lora_B` of each layer, from left to right, and gamma.

    Raises:
        ValueError: there are none.
    """
    file = Path(folder) / FACTORS_FILE
    if not file.is_file():
        rule = f"it has no {FACTORS_FILE}, the factors that training goes on from"
        raise refusal("folder", str(folder), rule, "Give one that a deep LoRA was saved in")
    saved: dict[str, list[Tensor]] = defaultdict(list)
    with safe_open(file, "pt") as tensors:
        for key in sorted(tensors.keys(), key=lambda key: (not key.endswith("original"), key)):
            saved[key.partition(".lora_B.")[0]].append(tensors.get_tensor(key))
        gamma = tensors.metadata()["gamma"]
    return dict(saved), float(gamma) if gamma else None


def multiplied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with products in the place of their factors."""
    result = dict(state)
    for name in state:
        module, is_held, rest = name.partition(f"{_HELD}original")
        if is_held and not rest and ".lora_B." in module:
            factors = [result.pop(name)]
            while (core := f"{module}{_HELD}{len(factors) - 1}.core") in result:
                factors.append(result.pop(core))
            result[f"{module}.weight"] = reduce(torch.matmul, factors).detach()
    return result


def _shapes(factors: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [factor.shape for factor in each] for name, each in factors.items()}

"""The adapters of Deep LoRA (arXiv 2406.04112), made of ordinary ones.

    dW = W3 W2 W1         each orthogonal, times 1e-3
    dW = U C3 C2 C1 V'    compressed: each C = 1e-3 I, r x r

`lora_A` of peft's layer holds W1 or V', and the weight of its `lora_B` becomes the product of the
other factors, which peft then uses like any weight: its own forward pass, merging, dropout and
quantised bases stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nso_hf.deep_lora.first_gradient import singular_vectors
from nso_hf.deep_lora.layers import hold, lora_layers
from nso_hf.deep_lora.saving import saves_factors
from nso_hf.refusal import check_positive, needs, refusal


def deepen(
    model: Any,
    *,
    first_batch: Mapping[str, Any] | None = None,
    scale: float = 1e-3,
    gamma: float | None = None,
) -> Any:
    """Make the active LoRA adapter of a `PeftModel` a deep one, in place and before it is trained.

    Args:
        first_batch: for the compressed form: U and V are the first r singular vectors of the
            gradient that the base weights have on it. `model(**first_batch)` returns a `.loss`. In
            several processes it must be the same.
        scale: of the orthogonal factors, or of the Cs.
        gamma: of the compressed form: U and V are trained at `gamma` times the learning rate,
            default 0.01. The trainers of this library see to that; for others there is
            `nso_hf.step.rates.slow_down`.

    Returns:
        the model, whose `save_pretrained` and `load_adapter` now know of the factors.

    Raises:
        ValueError: the adapter is not a LoRA of linear layers at scale 1, or has been trained.
    """
    needs("Deep LoRA", "recipes", "peft")
    check_positive("scale", scale, "The paper's is 1e-3")
    if gamma is not None and first_batch is None:
        rule = "only the compressed form has factors that are trained more slowly"
        raise refusal("gamma", gamma, rule, "Give a first_batch too, or leave it out")
    gamma = 0.01 if gamma is None else gamma
    check_positive("gamma", gamma, "The paper's is 0.01")
    adapter, layers = _checked_layers(model)
    if first_batch is None:
        for layer in layers.values():
            outputs, r = layer.lora_B[adapter].weight.shape
            device = layer.lora_B[adapter].weight.device
            W1, W2, W3 = (
                scale * nn.init.orthogonal_(torch.empty(shape, device=device))
                for shape in ((r, layer.lora_A[adapter].in_features), (r, r), (outputs, r))
            )
            hold(layer, adapter, W1, [W3, W2], None)
        return saves_factors(model)
    for name, layer in layers.items():
        r, sizes = layer.r[adapter], (layer.in_features, layer.out_features)
        if r > min(sizes):
            rule = f"a matrix of {sizes[1]} x {sizes[0]}, as of {name}, has fewer singular vectors"
            raise refusal("r", r, rule, f"Lower it to {min(sizes)}, or use the plain form")
    for name, (U, Vh) in singular_vectors(model, layers, adapter, first_batch).items():
        cores = [scale * torch.eye(len(Vh), device=U.device)] * 3
        # Of -G: the product begins as a small step down. Along +G the Cs would have to pass 0,
        # where their gradient vanishes.
        hold(layers[name], adapter, Vh, [-U, *cores], gamma)
    return saves_factors(model)


def _checked_layers(model: Any) -> tuple[str, dict[str, Any]]:
    """The active adapter and its layers.

    Raises:
        ValueError: it cannot be made deep.
    """
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(model, PeftModel):
        rule = "it has no adapters of peft's"
        raise refusal("model", type(model).__name__, rule, "Add LoRA with get_peft_model")
    adapter: Any = model.active_adapter
    layers = lora_layers(model, adapter)
    if not layers:
        kind = getattr(model.peft_config[adapter].peft_type, "value", None)
        rule = "only LoRA can be made deep"
        raise refusal("peft_type", kind, rule, "Use get_peft_model with a LoraConfig")
    for name, layer in layers.items():
        B = dict(layer.lora_B).get(adapter)
        if isinstance(layer, ParamWrapper):
            rule = f"{name} adapts a single weight, and only linear layers can be made deep"
            raise refusal("target_parameters", layer.parameter_name, rule, "Use target_modules")
        if type(B) is not nn.Linear:
            kind = type(layer.get_base_layer()).__name__
            rule = f"only adapters of linear layers can be made deep, and {name} is {kind}"
            raise refusal("target_modules", name.rpartition(".")[2], rule, "Leave it out")
        if B.bias is not None or layer.lora_variant.get(adapter) is not None:
            rule = "LoRA with biases, and variants such as DoRA, cannot be made deep"
            raise refusal("peft_config", adapter, rule, "Leave out lora_bias, use_dora and so on")
        if (scale := layer.scaling[adapter]) != 1:
            rule = f"Deep LoRA has no scale of its own, and {name} would be scaled by {scale:.3g}"
            cure = f"Set lora_alpha to the rank, {layer.r[adapter]}, without use_rslora"
            raise refusal("lora_alpha", layer.lora_alpha[adapter], rule, cure)
        if B.weight.any():
            rule = f"lora_B of {name} is not 0: the adapter is trained already, and would be lost"
            cure = "Make it deep first, or go on from a deep one with load_deep_lora"
            raise refusal("model", type(model).__name__, rule, cure)
    return adapter, layers

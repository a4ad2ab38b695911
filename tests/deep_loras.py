"""A tiny model with Deep LoRA, and the same with its factors written out."""

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nso_hf.deep_lora import deepen
from tests.reference import batched, tiny_llama, token_data

FORMS = ["plain", "compressed"]
SCALE = 0.3  # at the paper's 1e-3 a few steps of SGD leave the factors where they are
R = 4


def first_batch(examples=8):
    return batched(token_data(examples, seed=3))


def lora(model=None, r=R, **options):
    given = {"lora_alpha": r, "target_modules": ["q_proj", "v_proj"]} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model or tiny_llama(), LoraConfig(r=r, **given))


def deep(form, model=None, scale=SCALE, seed=1, **options):
    model = lora(model, **options)
    torch.manual_seed(seed)
    return deepen(model, scale=scale, first_batch=first_batch() if form == "compressed" else None)


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def factors(layer):
    """From left to right, as in dW = W3 W2 W1."""
    return [*layer.lora_B["default"].parameters(), layer.lora_A["default"].weight]


class Explicit(nn.Module):
    """y = W0 x + (W3 (W2 (W1 x))), its weights in the order that the adapted layer has them."""

    def __init__(self, layer):
        super().__init__()
        *left, right = (factor.detach().clone() for factor in factors(layer))
        self.base = copy.deepcopy(layer.base_layer)
        self.right, self.left = nn.ParameterList([right]), nn.ParameterList(left)

    def forward(self, x):
        h = x
        for W in [*self.right, *reversed(self.left)]:
            h = nn.functional.linear(h, W)
        return self.base(x) + h


def explicit(model):
    """The same model in plain PyTorch, without peft."""
    written = tiny_llama().requires_grad_(False)
    for name, layer in layers(model).items():
        path, _, last = name.removeprefix("base_model.model.").rpartition(".")
        setattr(written.get_submodule(path), last, Explicit(layer))
    return written

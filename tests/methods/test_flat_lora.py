"""Flat-LoRA against a loop written from its equation, on the layouts that layers have."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import SGD
from transformers import GPT2Config, GPT2LMHeadModel

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.step.noise import Noise
from tests.deep_loras import FORMS, deep
from tests.distributed.back_ends import lora
from tests.reference import (
    DEVICE,
    batched,
    causal_loss_sum,
    config,
    largest_difference,
    tiny_llama,
    token_data,
    whole_noise,
)

RHO = 0.5
TOLERANCE = 1e-6  # as in tests/methods/equations.py


def tiny_gpt2():
    """Its layers hold their matrices transposed."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(model, adapters).to(DEVICE)


def adapted(model):
    """W0, its index, A and B of each adapted layer; outputs come first in none or all of them."""
    indices = {id(p): i for i, p in enumerate(model.parameters())}
    for module in model.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            W0 = module.base_layer.weight
            yield (
                W0,
                indices[id(W0)],
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
            )


def reference_flat_lora(
    model, data, *, steps, batch, lr, two_sided=False, transposed=False, rho=RHO, scale=2
):
    trainable = [p for p in model.parameters() if p.requires_grad]
    for step in range(steps):
        examples = data[step * batch : (step + 1) * batch]
        stacked = batched(examples)
        tokens = (stacked["labels"][:, 1:] != -100).sum()
        f_t = (1 - math.cos(math.pi * (step + 1) / steps)) / 2
        layers = list(adapted(model))
        noise = []
        for W0, index, A, B in layers:
            delta = scale * (B @ A).detach()
            merged = (W0.T if transposed else W0) + delta
            std = f_t * rho / math.sqrt(merged.shape[1]) * merged.norm(dim=1)
            z = whole_noise(W0, index, Noise(42, step, 0, 1.0))
            noise.append(z * (std if transposed else std[:, None]))
        total = [torch.zeros_like(p) for p in trainable]
        signs = (1, -1) if two_sided else (1,)
        for sign in signs:
            kept = [W0.detach().clone() for W0, *_ in layers]
            for (W0, *_), eps in zip(layers, noise, strict=True):
                W0.data.add_(sign * eps)
            model.zero_grad()
            (causal_loss_sum(model, stacked) / tokens).backward()
            for t, p in zip(total, trainable, strict=True):
                t.add_(p.grad / len(signs))
            for (W0, *_), before in zip(layers, kept, strict=True):
                W0.data.copy_(before)
        for t, p in zip(total, trainable, strict=True):
            p.data.sub_(lr * t)
    model.zero_grad()


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [lambda: lora(tiny_llama()), tiny_gpt2], ids=["Llama", "GPT-2"])
def test_flat_lora_is_its_equation(tmp_path, make, accumulation, two_sided):
    data = token_data(24)
    expected, model, plain = make(), make(), make()
    for each in (expected, model, plain):  # B is 0 at first: W0 + s B A would be W0
        torch.manual_seed(1)
        for _, _, _, B in adapted(each):
            B.data.normal_(std=0.1)
    options = {"steps": 3, "batch": 8, "lr": 1.0, "transposed": make is tiny_gpt2}
    reference_flat_lora(expected, data, two_sided=two_sided, **options)
    args = config(
        tmp_path,
        method="flat_lora",
        method_kwargs={"rho": RHO, "two_sided": two_sided},
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
    assert largest_difference(model, expected) <= TOLERANCE
    for p, w in zip(model.parameters(), before, strict=True):
        assert p.requires_grad or torch.equal(p, w)  # the base, bit for bit
    reference_flat_lora(plain, data, two_sided=two_sided, rho=0.0, **options)
    assert largest_difference(plain, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_the_adapters_may_be_deep(tmp_path, form):
    """Then B is a product."""
    data, expected, model, plain = token_data(24), deep(form), deep(form), deep(form)
    options = {"steps": 3, "batch": 8, "lr": 0.3, "scale": 1}
    reference_flat_lora(expected, data, **options)
    reference_flat_lora(plain, data, rho=0.0, **options)
    assert largest_difference(plain, expected) > 100 * TOLERANCE
    args = config(
        tmp_path,
        method="flat_lora",
        method_kwargs={"rho": RHO},
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
    assert largest_difference(model, expected) <= TOLERANCE


def test_without_adapters_it_is_refused(tmp_path):
    args = NSOConfig(str(tmp_path), method="flat_lora", use_cpu=True)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no linear layer with a LoRA adapter"
    ):
        NSOTrainer(model=tiny_llama(), args=args, train_dataset=token_data(8))


def test_a_quantised_base_is_refused(tmp_path):
    model = lora(tiny_llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    args = NSOConfig(str(tmp_path), method="flat_lora", use_cpu=True)
    with pytest.raises(ValueError, match=r"q_proj\.weight.*it is quantised \(torch\.int8\)"):
        NSOTrainer(model=model, args=args, train_dataset=token_data(8))

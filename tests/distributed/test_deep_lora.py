"""Deep LoRA on every back end, with two processes."""

import pytest
import torch
from peft import PeftModel

from nso_hf.deep_lora import load_deep_lora
from tests.deep_loras import FORMS, deep, explicit, layers
from tests.distributed.back_ends import BACK_ENDS, assert_is, zero
from tests.distributed.launch import launch
from tests.older import IS_VERSION_4
from tests.reference import largest_difference, reference_nso, tiny_llama, token_data

pytestmark = pytest.mark.distributed

QUICK = ["ddp", "fsdp2", "zero2", "zero3"]
TOLERANCE = 1e-6  # as in tests/methods/equations.py
TRAINED = {
    "sigma": 0.05,
    "learning_rate": 0.3,
    "per_device_train_batch_size": 4,
    "max_grad_norm": 0.0,
}
SAVED = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "sigma": 0.05,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def reference(form):
    """SGD at 0.3, and at 0.003 on U and V."""
    model = explicit(deep(form))
    slow = [
        p
        for n, p in model.named_parameters()
        if form == "compressed" and n.endswith((".right.0", ".left.0"))
    ]
    ids = {id(p) for p in slow}
    inner = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": inner}, *([{"params": slow, "lr": 0.003}] if slow else [])]
    reference_nso(
        model,
        token_data(48),
        steps=3,
        global_batch=8,
        sigma=0.05,
        max_grad_norm=0.0,
        optimizer=torch.optim.SGD(groups, lr=0.3),
    )
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "back_end", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BACK_ENDS]
)
def test_it_is_trained_saved_and_resumed(back_end, form, tmp_path):
    base = {"back_end": back_end, "deep": form}
    directory = str(tmp_path / "run")
    cases = {
        "trained": {**base, **TRAINED},
        "whole": {**base, **SAVED, "output_dir": directory},
        "resumed": {
            **base,
            **SAVED,
            "output_dir": directory,
            "resume": f"{directory}/checkpoint-2",
        },
    }
    if IS_VERSION_4 and not back_end.startswith("zero"):
        del cases["resumed"]  # plain training does not go on as it was either
    expected, before = reference(form), explicit(deep(form))
    assert largest_difference(before, expected) > 100 * TOLERANCE
    for rank in launch(cases, tmp_path):
        for name in cases:
            assert_is(back_end, rank[name], processes=2)
        for p, w in zip(expected.parameters(), rank["trained"]["weights"], strict=True):
            assert (p - w).abs().max() <= TOLERANCE
        weights = rank["whole"]["weights"]
        if "resumed" in cases:
            assert all(map(torch.equal, weights, rank["resumed"]["weights"]))
    checkpoint = f"{directory}/checkpoint-4"
    again = load_deep_lora(tiny_llama(), checkpoint)
    assert all(map(torch.equal, again.parameters(), weights))
    plain = PeftModel.from_pretrained(tiny_llama(), checkpoint)
    for name, layer in layers(plain).items():
        dW = layers(again)[name].get_delta_weight("default")
        assert torch.equal(layer.get_delta_weight("default"), dW) and dW.abs().max() > 1e-3


def test_an_optimizer_of_the_configuration_is_refused_where_some_factors_are_slower(tmp_path):
    settings = {
        "deepspeed": {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
        }
    }
    base = {"experiment": "refused", "back_end": "zero2", "settings": settings, **TRAINED}
    cases = {form: {**base, "learning_rate": 1e-3, "deep": form} for form in FORMS}
    for rank in launch(cases, tmp_path):
        assert rank["plain"]["refused"] is None
        assert "the back end makes it with one learning rate" in rank["compressed"]["refused"]
    assert "optimizer" not in zero(2)["deepspeed"]

"""What LoRA leaves without adapters is said."""

import pytest
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from nso_hf.tasks.reasoning.models import ModelOptions, with_lora

SIZES = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        (GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, head_dim=4)), 4),
        (MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)), 0),  # peft adapts them
        (LlamaForCausalLM(LlamaConfig(**SIZES)), 0),
    ],
)
def test_experts_without_adapters_are_named(model, frozen, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("nso_hf.tasks.pretrained"), "propagate", True)
    fused = [name for name, p in model.named_parameters() if p.ndim == 3]
    with caplog.at_level("WARNING", logger="nso_hf.tasks.pretrained"):
        adapted = with_lora(model, ModelOptions("m", lora_r=2), False)
    said = [message for message in caplog.messages if "experts" in message]
    assert len(said) == bool(frozen)
    if frozen:
        assert len(fused) == frozen and said[0].startswith(f"{frozen} weights")
        assert fused[0] in said[0]
    elif fused:
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert any(".experts.lora_A" in name for name in trained)

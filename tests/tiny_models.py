"""Tiny models with a tokenizer, saved as folders that the recipe loads like any other model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_model(kind: str, path: Path) -> Path:
    """A model of kind "gpt2", "llama" (with a chat template), "bert" or "t5" with its tokenizer, in
    the folder `path`."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat=kind == "llama", pad=kind != "gpt2")
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    vocabulary = len(tokenizer)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=256, n_embd=32, n_layer=2, n_head=2, **special
        )
        model = GPT2LMHeadModel(config)
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                **special,
            )
        )
    elif kind == "bert":
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **special,
            )
        )
    else:
        special["decoder_start_token_id"] = 0
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocabulary,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=1,
                num_heads=2,
                **special,
            )
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

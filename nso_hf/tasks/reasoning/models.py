"""The model of a chain-of-thought recipe: its kind, its adapters, its limits."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nso_hf.deep_lora import deepen
from nso_hf.refusal import check_choice, refusal
from nso_hf.tasks.pretrained import PretrainedOptions, load_pretrained, with_adapters

DEEP_LORA = ["none", "plain", "compressed"]


@dataclass
class ModelOptions(PretrainedOptions):
    model_name_or_path: str = field(
        metadata={
            "help": "Hub id or folder of a causal (GPT-2, Llama, ...) or encoder-decoder (T5, ...) "
            "model. 'package:NAME' is the folder of an installed Python package that carries one."
        }
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Scale of the adapters. Default: 2 x lora_r; Deep LoRA has none."},
    )
    deep_lora: str = field(
        default="none",
        metadata={
            "help": "Deep LoRA, for few training texts: adapters of three factors (plain), or of "
            "five that begin from the gradient on the first 8 texts (compressed).",
            "choices": DEEP_LORA,
        },
    )

    def __post_init__(self) -> None:
        check_choice("deep_lora", self.deep_lora, DEEP_LORA)
        super().__post_init__()
        if self.deep_lora == "none":
            return
        self.check_without_lora("deep_lora", self.deep_lora)
        if self.lora_alpha not in (None, self.lora_r):
            rule = "Deep LoRA has no scale, and this would be one"
            cure = f"Leave it out, or set it to lora_r, {self.lora_r}"
            raise refusal("lora_alpha", self.lora_alpha, rule, cure)


def load_model(
    options: ModelOptions,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The model without adapters, its tokenizer, and whether it is an encoder-decoder."""
    model, tokenizer = load_pretrained(
        options,
        lambda config: AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM,
    )
    if model.loss_type is None:  # as of GPT-2: transformers takes this one and warns
        model.loss_type = "ForCausalLM"
    if tokenizer.eos_token_id is None:
        path, cure = options.model_name_or_path, "Add one to the tokenizer's configuration"
        raise refusal("model_name_or_path", path, "its tokenizer has no end-of-text token", cure)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        for config in (model.config, model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, bool(model.config.is_encoder_decoder)


def with_lora(
    model: PreTrainedModel,
    options: ModelOptions,
    is_encoder_decoder: bool,
    first_batch: dict[str, Any] | None = None,
) -> Any:
    """The model with trainable adapters on a frozen base. Those of compressed Deep LoRA begin from
    the gradient on the first batch."""
    from peft import TaskType

    task = TaskType.SEQ_2_SEQ_LM if is_encoder_decoder else TaskType.CAUSAL_LM
    if options.deep_lora == "none":
        return with_adapters(model, options, task)
    adapted = with_adapters(model, options, task, scale=1.0)
    return deepen(adapted, first_batch=first_batch if options.deep_lora == "compressed" else None)


def check_lengths(
    model: PreTrainedModel,
    max_length: int,
    max_new_tokens: int,
    longest_row: int,
    longest_prompt: int,
) -> None:
    """Refuse texts that have more tokens than the model has positions, if it says how many."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    if longest_row > positions:
        rule = f"a text has {longest_row} tokens and the model {positions} positions"
        raise refusal("max_length", max_length, rule, f"Set --max_length {positions}")
    separate = model.config.is_encoder_decoder  # the prompt and the answer have their own positions
    answer = max_new_tokens
    if (max(longest_prompt, answer) if separate else longest_prompt + answer) > positions:
        rule = f"with a prompt of {longest_prompt} it exceeds the model's {positions} positions"
        cure = "Lower it, or leave out the longest questions"
        raise refusal("max_new_tokens", max_new_tokens, rule, cure)

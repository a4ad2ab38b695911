"""A pretrained language model: where it comes from, and its adapters."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from nso_hf.backends import shape_of
from nso_hf.refusal import check_positive, refusal
from nso_hf.running.packages import in_package

logger = logging.get_logger(__name__)

_PEFT_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # peft still reads it
    # Of a base that is a GGUF file, whose vocabulary is indeed as it was.
    "Could not find a config file in .* - will assume that the vocabulary was not modified",
)


@dataclass
class PretrainedOptions:
    """Options of any recipe that fine-tunes a language model."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={
            "help": "Hub id or folder of a model. 'package:NAME' or 'package:NAME/FOLDER' is the "
            "folder of an installed Python package that carries one."
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
        default=None, metadata={"help": "Scale of the adapters. Default: 2 x lora_r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names (or their ends) of the modules to adapt. Default: all linear layers but "
            "the head."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise refusal("dtype", self.dtype, "unknown", "Use float32, bfloat16, float16 or auto")
        if self.lora_r is None:
            for option in ("lora_alpha", "lora_target_modules", "lora_dropout"):
                self.check_without_lora(option, getattr(self, option))
        elif not isinstance(self.lora_r, int) or self.lora_r < 1:
            raise refusal(
                "lora_r",
                self.lora_r,
                "must be an integer, at least 1",
                "Leave it out to train all weights",
            )
        if isinstance(self.lora_target_modules, str):
            rule, cure = "must be a list of names", "Write it as [q_proj, v_proj]"
            raise refusal("lora_target_modules", self.lora_target_modules, rule, cure)
        if self.lora_alpha is not None:
            check_positive("lora_alpha", self.lora_alpha, "Leave it out for 2 x lora_r")
        if not 0 <= self.lora_dropout < 1:
            raise refusal(
                "lora_dropout", self.lora_dropout, "must be in [0, 1)", "Typical: 0 to 0.1"
            )

    def check_without_lora(self, option: str, value: object) -> None:
        if value and self.lora_r is None:
            raise refusal(option, value, "has no effect without LoRA", "Set --lora_r too")


def load_pretrained(
    options: PretrainedOptions, class_of: Callable[[Any], Any], **config_options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without adapters, and its tokenizer.

    Args:
        class_of: the auto class for a configuration.
        config_options: of the configuration and of loading.

    Raises:
        ValueError: there is no such model, or the tokenizer is not its own.
    """
    path = _folder(options.model_name_or_path)
    files = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    try:
        model_class = class_of(AutoConfig.from_pretrained(path, **files))
        tokenizer = AutoTokenizer.from_pretrained(path, **files)
        model = model_class.from_pretrained(path, dtype=options.dtype, **files, **config_options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        cure = "Give a hub id, or a folder with config.json and the weights"
        raise refusal("model_name_or_path", path, reason, cure) from error
    if options.gguf_file:  # it was dequantised: from here on an ordinary model that can be saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    if not has_texts(tokenizer):
        cure = "Put that of its training there"
        raise refusal("model_name_or_path", path, "there is no tokenizer in it", cure)
    check_vocabulary(model, tokenizer, path)
    return model, tokenizer


def _folder(path: str) -> str:
    """Where the model is, if it is in a folder."""
    path = in_package(path, "model_name_or_path")
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise refusal("model_name_or_path", path, "no such folder", "Check the path")
    return path


def has_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has more than special tokens, of which alone some are made without files."""
    return len(tokenizer) > len(set(tokenizer.all_special_tokens))


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


def with_adapters(
    model: PreTrainedModel,
    options: PretrainedOptions,
    task_type: Any,
    *,
    scale: float = 2.0,
    head: Sequence[str] = (),
) -> Any:
    """The model with trainable adapters of LoRA on a frozen base.

    Args:
        task_type: peft's.
        scale: lora_alpha over lora_r, where the options do not say it.
        head: modules at the top of the model that are trained whole, and saved.
    """
    assert options.lora_r is not None
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    of_head = [name for name in names if name.split(".")[0] in head]
    names = [name for name in names if name not in of_head]
    for target in options.lora_target_modules or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            rule = f"no linear module of this model has this name; there are {', '.join(ends)}"
            raise refusal(
                "lora_target_modules", target, rule, "Use these names, or leave it out for all"
            )
    adapters = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha or options.lora_r * scale,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        exclude_modules=of_head or None,
        modules_to_save=list(head) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
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
    return adapted


def _experts_of(name: str) -> str:
    """The module that a weight is in, without what peft wraps around it."""
    return name.removesuffix(name.rpartition(".")[2]).split(".base_layer.")[0]

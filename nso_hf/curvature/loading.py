"""The model of a checkpoint, with its adapters where it has them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from nso_hf.refusal import Refusal, needs, refusal
from nso_hf.running.packages import in_package

_TASKS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
"""Task of an adapter -> what its base is loaded as; of others, as what it is."""

_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")

_SAVED_TWICE = re.compile(r"modules_to_save\.|original_module\.|^prompt_embeddings$")
"""Names of what PEFT saves under another name too, or loads by itself."""


def check_checkpoint(path: str, gguf_file: str | None = None) -> None:
    """
    Raises:
        ValueError: it is no folder of a model, and no id of one.
    """
    path = in_package(path, "checkpoint")
    folder = Path(path)
    if path.startswith((".", "/")) and not folder.is_dir():
        raise refusal("checkpoint", path, "no such folder", "Check the path")
    names = ["config.json", "adapter_config.json", *filter(None, [gguf_file])]
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        rule, cure = f"the folder has no {' or '.join(names)}", "Give the one of save_pretrained"
        if there := sorted(file.name for file in folder.glob("*.gguf")):
            cure = f"Pass --gguf_file {there[0]}"
        raise refusal("checkpoint", path, rule, cure)
    if not folder.is_dir():
        _own_class(path, _reading(gguf_file))


def load_checkpoint(path: str, gguf_file: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint in float32, its adapters trainable where it has them."""
    check_checkpoint(path, gguf_file)
    path, options = in_package(path, "checkpoint"), _reading(gguf_file)
    if (Path(path) / "adapter_config.json").is_file():
        return _with_adapter(path, options)
    return _load(_own_class(path, options), path, options)


def _reading(gguf_file: str | None) -> dict[str, Any]:
    return {"gguf_file": gguf_file} if gguf_file else {}


def _own_class(path: str, options: Mapping[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    kinds = getattr(config, "architectures", None) or []
    found = [getattr(transformers, kind) for kind in kinds if hasattr(transformers, kind)]
    if not found and options:  # a GGUF file, which holds language models
        return transformers.AutoModelForCausalLM
    if not found:
        rule = f"its config.json names no class of transformers ({kinds})"
        raise refusal("checkpoint", path, rule, "Measure it in Python, with your model class")
    return found[0]


def _load(model_class: Any, path: str, options: Mapping[str, Any]) -> PreTrainedModel:
    try:
        model: PreTrainedModel = model_class.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return model


def _unreadable(path: str, error: Exception) -> Refusal:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    cure = "Give a hub id, or a folder with config.json and the weights"
    return refusal("checkpoint", path, reason, cure)


def _with_adapter(path: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The base of an adapter as it was when the adapter was trained, and the adapter on it."""
    needs("a checkpoint of adapters", "recipes", "peft")
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(path)
        saved = load_peft_weights(path, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    base = _base(path, config, saved, options)
    _resize_embeddings(base, saved)
    # A prompt cannot be loaded as trainable, but be made so.
    model: Any = PeftModel.from_pretrained(base, path, is_trainable=not config.is_prompt_learning)
    if config.is_prompt_learning:
        model.prompt_encoder.requires_grad_(True)
    unexpected = set_peft_model_state_dict(model, saved).unexpected_keys
    unused = [name for name in unexpected if not _SAVED_TWICE.search(name)]
    if unused:
        rule = f"a {type(base).__name__} has no place for its {unused[0]}"
        raise refusal("checkpoint", path, rule, "Measure it in Python, with your model class")
    adapted: PreTrainedModel = model
    return adapted


def _base(
    adapter: str, config: Any, saved: Mapping[str, Tensor], options: Mapping[str, Any]
) -> PreTrainedModel:
    path = in_package(config.base_model_name_or_path, "checkpoint")
    check_checkpoint(path)
    own = _own_class(path, options)
    named = (config.auto_mapping or {}).get("base_model_class", "")
    model_class = getattr(transformers, named, None) or _TASKS.get(config.task_type, own)
    labels = [len(tensor) for name, tensor in saved.items() if name.endswith(_HEADS)]
    if labels and model_class is not own:
        options = {**options, "num_labels": labels[0], **_classes(adapter, labels[0])}
    return _load(model_class, path, options)


def _classes(adapter: str, number: int) -> dict[str, Any]:
    """What they are called, where a configuration beside the adapter says it."""
    if not (Path(adapter) / "config.json").is_file():
        return {}
    config = AutoConfig.from_pretrained(adapter)
    named = config.num_labels == number
    return {"id2label": config.id2label, "label2id": config.label2id} if named else {}


def _resize_embeddings(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> None:
    """Give the embeddings the rows that the adapter has saved of them."""
    layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in layers]
    ends = tuple(f".{name}.weight" for name in names)
    rows = {len(tensor) for name, tensor in saved.items() if name.endswith(ends)}
    if rows and max(rows) != layers[0].weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)

"""A model and its batches from a checkpoint and a data set, for the command line."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nso_hf.curvature.batches import Batch
from nso_hf.refusal import refusal

Row = Mapping[str, Any]

_BATCHES = 4  # of a data set, where nobody says how many
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_checkpoint(path: str, gguf_file: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint in float32, its LoRA adapters trainable where it has them."""
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise refusal("checkpoint", path, "no such folder", "Check the path")
    if (Path(path) / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(path).base_model_name_or_path
        model = PeftModel.from_pretrained(load_checkpoint(base, gguf_file), path, is_trainable=True)
        adapted: PreTrainedModel = model
        return adapted
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        kinds = getattr(config, "architectures", None) or []
        found = [getattr(transformers, kind) for kind in kinds if hasattr(transformers, kind)]
        if not found:
            rule = f"its config.json names no class of transformers ({kinds})"
            raise refusal("checkpoint", path, rule, "Measure it in Python, with your model class")
        loaded: PreTrainedModel = found[0].from_pretrained(path, dtype=torch.float32, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        cure = "Give a hub id, or a folder with config.json and the weights"
        raise refusal("checkpoint", path, reason, cure) from error
    return loaded


@dataclass(frozen=True)
class Data:
    """What the command line says of the data."""

    path: str
    split: str
    tokenizer: str
    """Where the tokenizer or the image processor is."""
    gguf_file: str | None
    batch_size: int
    num_batches: int | None
    max_length: int

    def batches(self, model: PreTrainedModel) -> list[Batch]:
        """The first batches for `model`: of a .pt file as they are, of a data set by the columns
        that the kind of model needs."""
        if Path(self.path).suffix == ".pt":
            if not Path(self.path).is_file():
                raise refusal("data", self.path, "no such file", "Check the path")
            try:
                saved = torch.load(self.path, weights_only=True)
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                cure = "Save it with torch.save([dict(batch), ...], path)"
                raise refusal("data", self.path, "not a list of dicts of tensors", cure) from error
            if not isinstance(saved, list):
                rule = f"a {type(saved).__name__}, not a list of dicts"
                raise refusal("data", self.path, rule, "Save a list of batches")
            return saved[: self.num_batches]
        adapted: Any = model
        inner = adapted.get_base_model() if hasattr(model, "get_base_model") else model
        kind = type(inner).__name__
        for ending, (columns, collate) in _KINDS.items():
            if kind.endswith(ending):
                return self._collated(columns, collate(self, model))
        rule = f"there is no reading of data sets for a {kind}"
        cure = "Pass a .pt file, torch.save([batch, ...]), of what the model takes"
        raise refusal("data", self.path, rule, cure)

    def _collated(
        self, columns: list[tuple[str, ...]], collate: Callable[[list[Row]], Batch]
    ) -> list[Batch]:
        rows = self._rows()
        if not any(set(names) <= set(rows[0]) for names in columns):
            wanted = " or ".join(" and ".join(names) for names in columns)
            rule = f"it has the columns {', '.join(rows[0])}"
            raise refusal("data", self.path, rule, f"Name them {wanted}")
        starts = range(0, len(rows), self.batch_size)
        return [collate(rows[start : start + self.batch_size]) for start in starts]

    def _rows(self) -> list[Row]:
        from datasets import load_dataset

        path = Path(self.path)
        looks_local = path.suffix in _FORMATS or self.path.startswith((".", "/"))
        if looks_local and not path.exists():
            raise refusal("data", self.path, "no such file or folder", "Check the path")
        if path.is_file() and path.suffix not in _FORMATS:
            known = ", ".join([".pt", *_FORMATS])
            raise refusal("data", self.path, f"not one of {known}", "Convert it")
        try:
            if path.suffix in _FORMATS:
                loaded = load_dataset(_FORMATS[path.suffix], data_files=self.path, split="train")
            else:
                loaded = load_dataset(self.path, split=self.split)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise refusal("data", self.path, reason, "Check the name and --split") from error
        number = _BATCHES if self.num_batches is None else self.num_batches
        rows: list[Row] = list(islice(loaded, self.batch_size * number))
        if not rows:
            raise refusal("data", self.path, "it is empty", "Use another split or file")
        return rows

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        options = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, **options)
        except (OSError, ValueError) as error:
            rule = "there is no tokenizer in it"
            raise refusal("tokenizer", self.tokenizer, rule, "Pass --tokenizer") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        loaded: PreTrainedTokenizerBase = tokenizer
        return loaded


def _language(data: Data, model: PreTrainedModel) -> Callable[[list[Row]], Batch]:
    """The loss of a text, or of a completion after its prompt."""
    tokenizer = data.load_tokenizer()
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def encoded(row: Row) -> dict[str, list[int]]:
        if "completion" in row:
            prompt, completion = ids(row["prompt"]), ids(row["completion"])
        else:
            prompt, completion = [], ids(row["text"])
        tokens = (prompt + completion)[: data.max_length]
        labels = ([-100] * len(prompt) + completion)[: data.max_length]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    return lambda rows: dict(collator([encoded(row) for row in rows]))


def _sequence_to_sequence(data: Data, model: PreTrainedModel) -> Callable[[list[Row]], Batch]:
    tokenizer = data.load_tokenizer()
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)

    def encoded(row: Row) -> Row:
        options = {"truncation": True, "max_length": data.max_length}
        labels = tokenizer(text_target=row["completion"], **options)["input_ids"]
        return {**tokenizer(row["prompt"], **options), "labels": labels}

    return lambda rows: dict(collator([encoded(row) for row in rows]))


def _text_classes(data: Data, model: PreTrainedModel) -> Callable[[list[Row]], Batch]:
    tokenizer = data.load_tokenizer()

    def collate(rows: list[Row]) -> Batch:
        options = {"truncation": True, "max_length": data.max_length, "padding": True}
        encoded = tokenizer([row["text"] for row in rows], return_tensors="pt", **options)
        return {**encoded, "labels": torch.tensor([row["label"] for row in rows])}

    return collate


def _image_classes(data: Data, model: PreTrainedModel) -> Callable[[list[Row]], Batch]:
    processor = transformers.AutoImageProcessor.from_pretrained(data.tokenizer)

    def collate(rows: list[Row]) -> Batch:
        images = [row["image"].convert("RGB") for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {**processor(images, return_tensors="pt"), "labels": labels}

    return collate


_KINDS: dict[str, tuple[list[tuple[str, ...]], Any]] = {
    "ForCausalLM": ([("text",), ("prompt", "completion")], _language),
    "LMHeadModel": ([("text",), ("prompt", "completion")], _language),
    "ForConditionalGeneration": ([("prompt", "completion")], _sequence_to_sequence),
    "ForSequenceClassification": ([("text", "label")], _text_classes),
    "ForImageClassification": ([("image", "label")], _image_classes),
}
"""How the name of a model's class ends -> the columns it can be measured on, and their collator."""

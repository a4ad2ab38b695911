"""The batches that the command line measures a checkpoint on, from a data set."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nso_hf.curvature.batches import Batch, examples_of
from nso_hf.refusal import Refusal, refusal
from nso_hf.running.sampling import drawn, places
from nso_hf.running.tables import SUFFIXES, is_table, rows

Row = Mapping[str, Any]
Collate = Callable[[list[Row]], Batch]
"""Of rows."""


@dataclass(frozen=True)
class Sample:
    """What a checkpoint is measured on."""

    batches: list[Batch]
    total: int | None = None
    """Examples that there are; None of saved batches."""
    num_classes: int | None = None
    """That the model tells apart; None where it is no classifier."""

    @property
    def classes(self) -> int:
        """That occur in it."""
        return len({label for batch in self.batches for label in batch["labels"].tolist()})

    @property
    def number(self) -> int:
        return sum(map(examples_of, self.batches))

    def as_json(self) -> dict[str, int | None]:
        classes = None if self.num_classes is None else self.classes
        return {"examples": self.number, "of": self.total, "classes": classes}

    def __str__(self) -> str:
        of = "" if self.total in (None, self.number) else f" of {self.total:,}, drawn at random"
        text = f"{self.number:,} examples{of}"
        if self.num_classes is not None:
            text += f"; {self.classes} of {self.num_classes} classes"
        return text


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
    """None for all."""
    max_length: int
    seed: int
    """Of the examples, where there are more than these."""

    def sample(self, model: PreTrainedModel) -> Sample:
        """Batches for `model`: of a .pt file the first as they are, of a data set examples drawn
        from all of it, by the columns that the kind of model needs."""
        if Path(self.path).suffix == ".pt":
            return Sample(self._saved(model))
        adapted: Any = model
        inner = adapted.get_base_model() if hasattr(model, "get_base_model") else model
        columns, collate = self._reading(inner)
        rows, total, classes = self._rows()
        if not any(set(names) <= set(rows[0]) for names in columns):
            wanted = " or ".join(" and ".join(names) for names in columns)
            rule = f"it has the columns {', '.join(rows[0])}"
            raise refusal("data", self.path, rule, f"Name them {wanted}")
        is_classifier = any("label" in names for names in columns)
        if is_classifier and classes is not None:
            rows = self._by_name(rows, classes, inner)
        starts = range(0, len(rows), self.batch_size)
        batches = [collate(rows[start : start + self.batch_size]) for start in starts]
        self._check_vocabulary(model, batches)
        taken = inspect.signature(inner.forward).parameters  # a tokenizer may know more
        read: list[Batch] = [{n: it for n, it in batch.items() if n in taken} for batch in batches]
        num_labels: int = inner.config.num_labels or 0
        return Sample(read, total, num_labels if is_classifier and num_labels > 1 else None)

    def _saved(self, model: PreTrainedModel) -> list[Batch]:
        if not Path(self.path).is_file():
            raise refusal("data", self.path, "no such file", "Check the path")
        try:
            saved = torch.load(self.path, weights_only=True)
        except Exception as error:  # of whatever is in it: of many kinds
            cure = "Save it with torch.save([dict(batch), ...], path)"
            raise refusal("data", self.path, "not a list of dicts of tensors", cure) from error
        if not isinstance(saved, list):
            rule = f"a {type(saved).__name__}, not a list of dicts"
            raise refusal("data", self.path, rule, "Save a list of batches")
        if not saved:
            raise refusal("data", self.path, "it has no batches", "Save one or more")
        self._check_taken(model, saved[0])
        return saved[: self.num_batches]

    def _check_taken(self, model: PreTrainedModel, batch: Any) -> None:
        """Refuse batches that the model does not take, or has no loss for."""
        adapted: Any = model
        cure = "Save what model(**batch) takes, with its labels"
        try:
            with torch.no_grad():
                loss = dict(adapted(**batch)).get("loss")
        except Exception as error:  # of any model: of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            rule = f"a {type(model).__name__} does not take its batches ({reason})"
            raise refusal("data", self.path, rule, cure) from error
        if loss is None:
            rule = f"a {type(model).__name__} has no loss for its batches"
            raise refusal("data", self.path, rule, cure)

    def _reading(self, model: PreTrainedModel) -> tuple[list[tuple[str, ...]], Collate]:
        """The columns that a kind of model can be measured on, and what makes batches of them."""
        kind, texts = type(model).__name__, model.main_input_name == "input_ids"
        if kind.endswith("ForSequenceClassification"):
            return [("text", "label")], _text_classes(self, model)
        if kind.endswith("ForImageClassification"):
            return [("image", "label")], _image_classes(self, model)
        if kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and texts:
            # Not by the name: models that only decode are named ForConditionalGeneration too.
            if model.config.is_encoder_decoder:
                return [("prompt", "completion")], _sequence_to_sequence(self, model)
            return [("text",), ("prompt", "completion")], _language(self, model)
        rule = f"there is no reading of data sets for a {kind}"
        cure = "Pass a .pt file, torch.save([batch, ...]), of what the model takes"
        raise refusal("data", self.path, rule, cure)

    def _rows(self) -> tuple[list[Row], int, list[str] | None]:
        """Some, how many there are, and the names of the classes where these are numbers."""
        number = None if self.num_batches is None else self.batch_size * self.num_batches
        path = Path(self.path)
        if is_table(path):
            some, total = drawn(rows(path), number, self.seed)
            return list(some), total, None
        if self.path.startswith((".", "/")) and not path.exists():
            raise refusal("data", self.path, "no such file or folder", "Check the path")
        if path.is_file():
            raise refusal("data", self.path, f"not one of .pt, {', '.join(SUFFIXES)}", "Convert it")
        from datasets import load_dataset

        try:
            loaded = load_dataset(self.path, split=self.split)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise refusal("data", self.path, reason, "Check the name and --split") from error
        found: list[Row] = []
        for place in places(number, len(loaded), self.seed):
            try:
                found.append(loaded[place])
            except (OSError, ValueError) as error:  # of an image that is broken
                rule = f"row {place + 1} cannot be read ({error})"
                raise refusal("data", self.path, rule, "Replace it, or leave it out") from error
        if not found:
            raise refusal("data", self.path, "it is empty", "Use another split or file")
        return found, len(loaded), getattr(loaded.features.get("label"), "names", None)

    def _by_name(
        self, rows: list[Row], classes: Sequence[str], model: PreTrainedModel
    ) -> list[Row]:
        """Rows whose label is the number of the model's class of that name, where it has them all,
        and otherwise as they are.

        Raises:
            ValueError: these are folders, and the model knows other names.
        """
        config: Any = model.config
        own = {str(name).casefold(): number for number, name in config.id2label.items()}
        if all(name.casefold() in own for name in classes):
            numbers = [own[name.casefold()] for name in classes]
            known = range(len(numbers))  # -1, which data sets write for none, is refused below
            return [
                {**row, "label": numbers[row["label"]]} if row["label"] in known else row
                for row in rows
            ]
        has_names = not all(name.startswith("label_") for name in own)
        if has_names and (Path(self.path).is_dir() or len(classes) != len(own)):
            unknown = next(name for name in classes if name.casefold() not in own)
            rule = f"the model has no class {unknown!r}, but {', '.join(list(own)[:5])}, ..."
            raise refusal("data", self.path, rule, "Name the classes as the model does")
        return rows

    def _check_vocabulary(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        tokens = [int(batch["input_ids"].max()) for batch in batches if "input_ids" in batch]
        if not tokens:  # of images, whose model may have no embeddings
            return
        size, largest = getattr(model.get_input_embeddings(), "num_embeddings", None), max(tokens)
        if size is not None and largest >= size:
            rule = f"it has a token {largest}, and the model an embedding of {size}"
            raise refusal("tokenizer", self.tokenizer, rule, "Pass the one of its training")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """With a token to pad with, if it has any that can be."""
        options = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        error: Exception | None = None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as failure:
            tokenizer, error = None, failure
        # Without its files, some kinds are made of their special tokens alone.
        if tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            rule = "there is no tokenizer in it"
            raise refusal("tokenizer", self.tokenizer, rule, "Pass --tokenizer") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        loaded: PreTrainedTokenizerBase = tokenizer
        return loaded

    def refuse(self, row: Row, rule: str, cure: str) -> Refusal:
        shown = {name: value if len(repr(value)) < 60 else "..." for name, value in row.items()}
        return refusal("data", self.path, f"{rule} in the row {shown}", cure)

    def text(self, row: Row, column: str) -> str:
        """
        Raises:
            ValueError: the row has none.
        """
        value = row.get(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value:
            raise self.refuse(row, f"there is no text as {column}", "Write one, or drop the row")
        return value


def _language(data: Data, model: PreTrainedModel | None) -> Collate:
    """The loss of a text, or of a completion and its end after a prompt: as the recipe trains."""
    tokenizer = data.load_tokenizer()
    begin, end = tokenizer.bos_token, tokenizer.eos_token_id

    def prompt_ids(text: str) -> list[int]:
        # A chat template has written the special tokens itself.
        special = not (begin and text.startswith(begin))
        ids: list[int] = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        return ids[:-1] if special and ids[-1:] == [end] else ids

    def encoded(row: Row) -> dict[str, torch.Tensor]:
        if "completion" in row:
            prompt = prompt_ids(data.text(row, "prompt"))
            text = data.text(row, "completion")
            completion = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            completion += [] if end is None else [end]
        else:
            prompt, completion = [], list(tokenizer(data.text(row, "text"))["input_ids"])
        labels = ([-100] * len(prompt) + completion)[: data.max_length]
        if all(label == -100 for label in labels[1:]):
            rule = f"of {data.max_length} tokens none is predicted"
            raise data.refuse(row, rule, "Raise --max_length, or drop the row")
        ids = torch.tensor((prompt + completion)[: data.max_length])
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}

    padding = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": -100}

    def collate(rows: list[Row]) -> Batch:
        each = [encoded(row) for row in rows]
        return {
            name: pad_sequence([e[name] for e in each], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }

    return collate


def _sequence_to_sequence(data: Data, model: PreTrainedModel) -> Collate:
    tokenizer = data.load_tokenizer()
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)

    def encoded(row: Row) -> Row:
        options = {"truncation": True, "max_length": data.max_length}
        completion = data.text(row, "completion")
        labels = tokenizer(text_target=completion, **options)["input_ids"]
        return {**tokenizer(data.text(row, "prompt"), **options), "labels": labels}

    return lambda rows: dict(collator([encoded(row) for row in rows]))


def _text_classes(data: Data, model: PreTrainedModel) -> Collate:
    tokenizer = data.load_tokenizer()
    if tokenizer.pad_token_id is None and data.batch_size > 1:
        rule = "it has no token to pad with"
        raise refusal("tokenizer", data.tokenizer, rule, "Pass --batch_size 1")
    if model.config.pad_token_id is None:  # the last token before the padding is classified
        model.config.pad_token_id = tokenizer.pad_token_id

    def collate(rows: list[Row]) -> Batch:
        options = {"truncation": True, "max_length": data.max_length}
        padding = {"padding": tokenizer.pad_token_id is not None}
        texts = [data.text(row, "text") for row in rows]
        encoded = tokenizer(texts, return_tensors="pt", **options, **padding)
        return {**encoded, "labels": _labels(data, model, rows)}

    return collate


def _image_classes(data: Data, model: PreTrainedModel) -> Collate:
    from datasets import Image

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(data.tokenizer)
    except (OSError, ValueError) as error:
        rule = "there is no image processor in it"
        raise refusal("tokenizer", data.tokenizer, rule, "Pass --tokenizer") from error

    def image(row: Row) -> Any:
        value = row["image"]
        if isinstance(value, str):  # a path, as it stands or from the folder of the table
            paths = [Path(value), Path(data.path).parent / value]
            value = {"path": str(next((p for p in paths if p.is_file()), value)), "bytes": None}
        try:
            decoded: Any = Image().decode_example(value) if isinstance(value, dict) else value
            return decoded.convert("RGB")
        except (OSError, AttributeError, ValueError) as error:
            raise data.refuse(row, f"no image can be read ({error})", "Check it") from error

    def collate(rows: list[Row]) -> Batch:
        images = [image(row) for row in rows]
        return {**processor(images, return_tensors="pt"), "labels": _labels(data, model, rows)}

    return collate


def _labels(data: Data, model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    """The classes of rows, by the names or the numbers that the model has for them; of a
    regression, the values."""
    config: Any = model.config
    names: dict[str, int] = {str(name): number for number, name in config.id2label.items()}

    def label(row: Row) -> float:
        written = str(row.get("label")).strip()
        try:
            number = float(written)
        except ValueError:
            number = float("nan")
        if config.num_labels == 1 and number == number:
            return number
        is_class = number.is_integer() and 0 <= number < config.num_labels
        found: set[int] = {names[written]} if written in names else set()
        found |= {int(number)} if is_class else set()
        if len(found) != 1:
            classes = ", ".join(f"{n} ({name})" for name, n in list(names.items())[:5])
            rule = f"the label is {'several' if found else 'none'} of the model's {classes}"
            raise data.refuse(row, rule, "Write their names or numbers")
        return found.pop()

    return torch.tensor([label(row) for row in rows])

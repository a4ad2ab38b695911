"""The options of fine-tuning on chains of thought."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nso_hf.refusal import refusal
from nso_hf.running.tables import is_table
from nso_hf.tasks.reasoning.examples import (
    PRESETS,
    Columns,
    Example,
    hold_out,
    load_examples,
    without_questions_of,
)
from nso_hf.tasks.reasoning.generated import generate_examples


class Splits(NamedTuple):
    """The examples of each split."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass
class DataOptions:
    _argument_group_name = "data"
    _may_change = ("evaluate_before",)  # when a run goes on

    dataset: str = field(
        metadata={
            "help": f"One of {', '.join(p for p in PRESETS if p != 'columns')}; reasoning_gym:TASK "
            "(generated); a hub id; "
            "or a local .csv, .tsv, .json, .jsonl or .parquet file, a folder of such files named "
            "train, validation, test, or a copy of a data set of the hub."
        }
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "How the rows are read. Default: that of the same name, else 'columns'.",
            "choices": list(PRESETS),
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration on the hub, or in a copy of it."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of a reasoning_gym task, as JSON."}
    )
    question_column: str = field(default="question", metadata={"help": "Column of the question."})
    rationale_column: str = field(
        default="rationale", metadata={"help": "Column of the rationale, or of a list of several."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column of the answer."})
    train_size: int | None = field(
        default=None,
        metadata={
            "help": "Use so many training questions. Default: all; 1000 where they are generated."
        },
    )
    validation_size: int = field(
        default=200,
        metadata={
            "help": "Validation questions, held out from training where there is no such split."
        },
    )
    test_size: int | None = field(
        default=None,
        metadata={"help": "Test questions. Default: all; 200 where held out or generated."},
    )
    format: str = field(
        default="rationale",
        metadata={
            "help": "Train on the rationale and the answer, or on the answer alone.",
            "choices": ["rationale", "answer"],
        },
    )
    template: str = field(
        default="auto",
        metadata={
            "help": "'plain': 'QUESTION ###' -> ' RATIONALE --> ANSWER'. 'chat': the model's chat "
            "template. "
            "'auto': chat where the model has one.",
            "choices": ["auto", "plain", "chat"],
        },
    )
    instruction: str = field(
        default="Think step by step, then write --> and the final answer.",
        metadata={"help": "Follows the question in chat templates."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Leave out training texts of more tokens than this."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Tokens that an answer may take in evaluation."}
    )
    evaluate_before: bool = field(
        default=True, metadata={"help": "Answer the test questions before training too."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_kwargs, str):
            try:
                self.dataset_kwargs = json.loads(self.dataset_kwargs)
            except json.JSONDecodeError as error:
                cure = """Write it as '{"min_terms": 3}'"""
                raise refusal(
                    "dataset_kwargs", self.dataset_kwargs, f"not JSON ({error})", cure
                ) from error
        if self.dataset_kwargs and self.task is None:
            cure = "Set it to {}, or use --dataset reasoning_gym:TASK"
            raise refusal(
                "dataset_kwargs", self.dataset_kwargs, "only read by reasoning_gym tasks", cure
            )
        if self.preset is None:
            self.preset = self.dataset if self.dataset in PRESETS else "columns"
        for option, choices in [
            ("preset", list(PRESETS)),
            ("format", ["rationale", "answer"]),
            ("template", ["auto", "plain", "chat"]),
        ]:
            if getattr(self, option) not in choices:
                raise refusal(option, getattr(self, option), "unknown", f"Use {', '.join(choices)}")
        for option in (
            "train_size",
            "validation_size",
            "test_size",
            "max_length",
            "max_new_tokens",
        ):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise refusal(option, value, "must be at least 1", "Give a positive number")
        looks_local = is_table(self.dataset) or self.dataset.startswith((".", "/"))
        if looks_local and not Path(self.dataset).exists():
            raise refusal("dataset", self.dataset, "no such file or folder", "Check the path")

    @property
    def task(self) -> str | None:
        """The reasoning-gym task, where the data are generated."""
        prefix, colon, task = self.dataset.partition(":")
        return task if colon and prefix == "reasoning_gym" else None

    def load(self, seed: int) -> Splits:
        """Training, validation and test examples; no question is in two of them.

        Raises:
            ValueError: there is no such data, or a split of it is empty.
        """
        splits = Splits(*self._load(seed))
        if not all(splits):
            train, validation, test = map(len, splits)
            rule = f"leaves {train} training, {validation} validation and {test} test questions"
            cure = "Lower --validation_size or --test_size"
            raise refusal("dataset", self.dataset, rule, cure)
        if self.format == "rationale" and not all(example.rationales for example in splits.train):
            without = sum(not example.rationales for example in splits.train)
            rule = f"{without} of {len(splits.train)} training questions have no rationale"
            raise refusal("format", self.format, rule, "Set --rationale_column, or --format answer")
        return splits

    def described(self, splits: Splits, texts: int, too_long: int) -> str:
        """How many texts and questions there are, and why there are fewer than asked for."""
        train, validation, test = (len({e.question for e in split}) for split in splits)
        left_out = (
            f" ({too_long} longer than {self.max_length} tokens left out)" if too_long else ""
        )
        text = f"{texts} training texts of {train} questions{left_out}, "
        text += f"{validation} validation and {test} test questions"
        asked = {
            "training": (train, self.train_size or (1000 if self.task else 0)),
            "validation": (validation, self.validation_size),
            "test": (test, self.test_size),
        }
        fewer = [
            f"{there} of {size} {name}"
            for name, (there, size) in asked.items()
            if size and there < size
        ]
        if fewer:
            text += f"\n{', '.join(fewer)} questions: the rest occur twice, or there are no more"
        return text

    def _load(self, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
        if self.task is not None:
            return self._generate(self.task, seed)
        preset = PRESETS[str(self.preset)]
        path = preset.path if self.dataset == self.preset and preset.path else self.dataset
        options: dict[str, Any] = {
            "preset": self.preset,
            "config": self.dataset_config,
            "columns": Columns(self.question_column, self.rationale_column, self.answer_column),
        }
        train = load_examples(path, "train", **options)
        if train is None:
            raise refusal("dataset", path, "has no split 'train'", "Name the file train.jsonl")
        test = load_examples(path, preset.test_split, **options)
        if test is None:
            train, test = hold_out(train, self.test_size or 200, seed)
        if self.test_size is not None:
            _, test = hold_out(test, self.test_size, seed)
        train = without_questions_of(train, test)  # before validation is held out of it
        validation = None
        if preset.test_split != "validation":
            validation = load_examples(path, "validation", **options)
        if validation is None:
            train, validation = hold_out(train, self.validation_size, seed)
        validation = without_questions_of(validation, test)
        _, validation = hold_out(validation, self.validation_size, seed)
        train = without_questions_of(train, validation)
        if self.train_size is not None:
            _, train = hold_out(train, self.train_size, seed)
        return train, validation, test

    def _generate(self, task: str, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
        kwargs = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        sizes = (self.test_size or 200, self.validation_size, self.train_size or 1000)
        splits: list[list[Example]] = []
        for number, size in enumerate(sizes):
            # Item i of a task is a function of its seed + i: the splits are far apart.
            examples = generate_examples(task, size, 10_000_000 * (3 * seed + number), **kwargs)
            splits.append(without_questions_of(examples, [e for split in splits for e in split]))
        test, validation, train = splits
        return train, validation, test

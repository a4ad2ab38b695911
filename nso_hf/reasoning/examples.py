"""Questions with rationales and answers, from the hub, from local files, or generated."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nso_hf.refusal import refusal

_SUFFIXES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Example:
    """One question; `rationales` may be several (as from a teacher), or none where only the answer
    is known."""

    question: str
    answer: str
    rationales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what."""

    question: str = "question"
    rationale: str = "rationale"
    answer: str = "answer"


Row = Mapping[str, Any]


def _plain(row: Row, columns: Columns) -> Example:
    rationale = row.get(columns.rationale)
    several = (rationale or "") if isinstance(rationale, str) or rationale is None else rationale
    rationales = (several,) if isinstance(several, str) else tuple(several)
    answer = row[columns.answer]
    text = ("yes" if answer else "no") if isinstance(answer, bool) else str(answer)
    return Example(str(row[columns.question]), text, tuple(r for r in rationales if r))


def _gsm8k(row: Row, columns: Columns) -> Example:
    rationale, marker, answer = str(row[columns.answer]).rpartition("####")
    if not marker:
        rule = f"preset gsm8k expects 'rationale #### answer', not {answer[:60]!r}"
        raise refusal(
            "answer_column", columns.answer, rule, "Use the right column, or --preset columns"
        )
    steps = re.sub(r"<<.*?>>", "", rationale).strip()  # the calculator's annotations
    return Example(str(row[columns.question]), answer.strip().replace(",", ""), (steps,))


def _commonsense_qa(row: Row, columns: Columns) -> Example:
    choices = row["choices"]
    listed = " ".join(f"({a}) {b}" for a, b in zip(choices["label"], choices["text"], strict=True))
    question = f"{row[columns.question]}\nAnswer choices: {listed}"
    key = columns.answer if columns.answer in row else "answerKey"
    return _plain({**row, columns.question: question, columns.answer: row[key]}, columns)


def _strategy_qa(row: Row, columns: Columns) -> Example:
    facts = row.get(columns.rationale, row.get("facts"))
    rationale = " ".join(facts) if isinstance(facts, list) else facts
    return _plain({**row, columns.rationale: rationale}, columns)


@dataclass(frozen=True)
class Preset:
    """How a well-known data set is found and read."""

    parse: Callable[[Row, Columns], Example]
    path: str | None = None
    config: str | None = None
    test_split: str = "test"


PRESETS: dict[str, Preset] = {
    "columns": Preset(_plain),
    "gsm8k": Preset(_gsm8k, "openai/gsm8k", "main"),
    # The answers of the test split are not public.
    "commonsense_qa": Preset(_commonsense_qa, "tau/commonsense_qa", test_split="validation"),
    "strategy_qa": Preset(_strategy_qa, "ChilleD/StrategyQA"),
}
"""Name -> preset. "columns" reads any data set by its column names."""


def load_examples(
    dataset: str,
    split: str,
    *,
    preset: str = "columns",
    config: str | None = None,
    columns: Columns | None = None,
) -> list[Example] | None:
    """The examples of one split of a hub data set, a local file (split "train") or a folder of
    files named after splits.

    None where there is no such split.

    Raises:
        ValueError: no such file, column or row format; the message names the columns there are.
    """
    from datasets import get_dataset_split_names, load_dataset

    columns = columns or Columns()
    path = Path(dataset)
    if path.exists():
        files = _local_files(path)
        if split not in files:
            return None
        rows = load_dataset(
            _SUFFIXES[files[split].suffix], data_files=str(files[split]), split="train"
        )
    else:
        try:
            if split not in get_dataset_split_names(dataset, config):
                return None
            rows = load_dataset(dataset, config, split=split)
        except (OSError, ValueError) as error:  # not there, no network, no such configuration
            reason = str(error).strip().splitlines()[0].rstrip(".")
            cure = "Check the id, --dataset_config and the network, or give a local path"
            raise refusal("dataset", dataset, reason, cure) from error
    parse = PRESETS[preset].parse
    try:
        return [parse(row, columns) for row in rows]
    except KeyError as error:
        there = f"{dataset} has the columns {', '.join(rows.column_names)}"
        cure = "Set --question_column, --rationale_column and --answer_column, or --preset"
        raise refusal("column", error.args[0], there, cure) from error


def _local_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise refusal("dataset", str(path), f"not one of {', '.join(_SUFFIXES)}", "Convert it")
        return {"train": path}
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES}
    if not files:
        rule = f"the folder has no {', '.join(_SUFFIXES)} file"
        raise refusal("dataset", str(path), rule, "Put train.jsonl (and test.jsonl) into it")
    return files


def hold_out(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples without `count` questions drawn at random, and those questions: no question is
    in both."""
    questions = list(dict.fromkeys(example.question for example in examples))
    held = set(random.Random(seed).sample(questions, min(count, len(questions))))
    kept = [example for example in examples if example.question not in held]
    return kept, [example for example in examples if example.question in held]


def without_questions_of(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The examples whose question is none of `others`."""
    taken = {example.question for example in others}
    return [example for example in examples if example.question not in taken]

"""Questions with rationales and answers, from the hub or from local files."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nso_hf.refusal import refusal
from nso_hf.running.sources import Row, RowError, Source, open_split, text_of


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


def _question(row: Row, columns: Columns) -> str:
    text = text_of(row, columns.question)
    if not text.strip():
        raise RowError(f"{columns.question!r} is blank")
    return text


def _rationales(row: Row, name: str) -> tuple[str, ...]:
    """Those that a column holds, one or a list of several: blank ones are none."""
    found = row.get(name)
    several = found if isinstance(found, list) else [found]
    texts = [text_of({name: one}, name) for one in several if one is not None]
    return tuple(text for text in texts if text.strip())


def _plain(row: Row, columns: Columns) -> Example:
    rationales = _rationales(row, columns.rationale)
    return Example(_question(row, columns), text_of(row, columns.answer), rationales)


_THOUSANDS = re.compile(r"[^\d()\[\]{}]*\d{1,3}(?:,\d{3})+(?:\.\d+)?[^\d,()\[\]{}]*")


def _gsm8k(row: Row, columns: Columns) -> Example:
    text = text_of(row, columns.answer)
    rationale, marker, answer = (part.strip() for part in text.rpartition("####"))
    if not marker or not answer:
        cause = f"preset gsm8k expects 'rationale #### answer', not {text[-60:]!r}"
        raise RowError(cause, "Set --answer_column, or --preset columns")
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    steps = re.sub(r"<<.*?>>", "", rationale).strip()  # the calculator's annotations
    return Example(_question(row, columns), answer, (steps,) if steps else ())


def _commonsense_qa(row: Row, columns: Columns) -> Example:
    choices = row["choices"]
    try:
        pairs = list(zip(choices["label"], choices["text"], strict=True))
    except (TypeError, KeyError, ValueError) as error:
        cause = f"'choices' is no object of 'label' and 'text', as many of each ({error})"
        raise RowError(cause, "Write it so, or use --preset columns") from error
    listed = " ".join(f"({label}) {text}" for label, text in pairs)
    question = f"{_question(row, columns)}\nAnswer choices: {listed}"
    key = columns.answer if columns.answer in row else "answerKey"
    return _plain({**row, columns.question: question, columns.answer: row[key]}, columns)


def _strategy_qa(row: Row, columns: Columns) -> Example:
    facts = _rationales(row, columns.rationale if columns.rationale in row else "facts")
    answer = text_of(row, columns.answer)
    answer = {"true": "yes", "false": "no"}.get(answer.lower(), answer)
    return Example(_question(row, columns), answer, (" ".join(facts),) if facts else ())


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
    files named after splits, as one writes it or as it is on the hub.

    None where there is no such split.

    Raises:
        ValueError: no such file or column, or a row that is no question with an answer. One line
            that names the file, the row and the cause.
    """
    sources = open_split(dataset, split, config, PRESETS[preset].config)
    if sources is None:
        return None
    parse = PRESETS[preset].parse
    return [example for source in sources for example in _parsed(source, parse, columns)]


def _parsed(
    source: Source, parse: Callable[[Row, Columns], Example], columns: Columns | None
) -> Iterator[Example]:
    name, rows = source
    for number, row in enumerate(rows, 1):
        try:
            yield parse(row, columns or Columns())
        except KeyError as error:
            there = f"row {number} of {name} has the columns {', '.join(map(repr, row))}"
            cure = "Set --question_column, --rationale_column and --answer_column, or --preset"
            raise refusal("column", error.args[0], there, cure) from error
        except RowError as error:
            raise refusal("dataset", name, f"row {number}: {error}", error.cure) from error


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

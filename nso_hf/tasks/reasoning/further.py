"""Further data sets, measured before training and after it: what a model forgets of other tasks and
of texts, and what it does on other problems than it is trained on."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, check_integer, refusal
from nso_hf.running.sources import open_split
from nso_hf.running.tables import encoding_of, is_table
from nso_hf.tasks.reasoning.examples import (
    PRESETS,
    Columns,
    Example,
    hold_out,
    load_examples,
    without_questions_of,
)
from nso_hf.tasks.reasoning.generated import generate_examples
from nso_hf.tasks.reasoning.prompts import PromptFormat
from nso_hf.tasks.reasoning.texts import Piece, pieces

_SPEC = re.compile(r"(?:([\w. -]+)=)?(?!=)(.*[^=])", re.DOTALL)
_TASK = re.compile(r"reasoning_gym:(\w+)\s*(\{.*\})?", re.DOTALL)
_GENERATED = 200  # questions, where no number was asked for
_TEXT = "text"  # the column of texts


@dataclass(frozen=True)
class FurtherSet:
    """Questions, or texts, each of them cut into pieces."""

    name: str
    option: str
    """That named it."""
    spec: str
    examples: Sequence[Example] = ()
    texts: Sequence[Sequence[Piece]] = ()

    @property
    def kind(self) -> str:
        return "task" if self.examples else "text"

    @property
    def measure(self) -> str:
        """What its mean is called."""
        return "accuracy" if self.examples else "loss"


@dataclass
class FurtherOptions:
    _argument_group_name = "further data"

    forgetting_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "What training may make the model forget, measured before and after: NAME=DATA "
            "or DATA, one or several. A text file or a table with a column 'text' (loss per "
            "token); reasoning_gym:TASK, reasoning_gym:TASK{OPTIONS as JSON}, a table or folder of "
            "questions and answers, PRESET or PRESET:FOLDER (accuracy)."
        },
    )
    also_test: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further test questions, such as longer problems than it is trained on: "
            """'longer=reasoning_gym:chain_sum{"min_terms": 5, "max_terms": 6}'. Written so too."""
        },
    )
    further_size: int | None = field(
        default=None,
        metadata={
            "help": "Questions or texts of each of these. Default: all; 200 where generated."
        },
    )

    def __post_init__(self) -> None:
        if self.further_size is not None:
            cure = "Two or more have a standard error"
            check_integer("further_size", self.further_size, 2, cure)
            if not (self.forgetting_data or self.also_test):
                rule, cure = "there are no further data", "Set --forgetting_data or --also_test"
                raise refusal("further_size", self.further_size, rule, cure)
        taken: set[str] = set()
        for option, name, spec in self._named():
            if name in taken:
                cure = "Write NAME=DATA, with a name of its own for each"
                raise refusal(option, spec, f"two further data sets are called {name!r}", cure)
            taken.add(name)
            _check(option, spec)

    def _named(self) -> Iterator[tuple[str, str, str]]:
        """Option, name and data of each."""
        for option in ("forgetting_data", "also_test"):
            specs = getattr(self, option) or []
            if isinstance(specs, str):
                raise refusal(option, specs, "must be a list", f"Write it as [{specs!r}]")
            for spec in specs:
                found = _SPEC.fullmatch(spec)
                if found is None:
                    raise refusal(option, spec, "names no data", "Write NAME=DATA")
                name, data = found.groups()
                task = _TASK.fullmatch(data)
                yield option, name or (task[1] if task else Path(_preset(data)[1]).stem), data

    def load(
        self,
        prompt_format: PromptFormat,
        seen: Sequence[Example],
        columns: Columns,
        max_length: int,
        seed: int,
    ) -> list[FurtherSet]:
        """All of them; without the questions that training has `seen`.

        Args:
            max_length: tokens of a piece of a text.

        Raises:
            ValueError: there are no such data, or fewer than two questions or texts.
        """
        sets = []
        for option, name, spec in self._named():
            texts: list[Any] = []
            try:
                examples: list[Example] = _questions(spec, columns, self.further_size, seed) or []
                if not examples:
                    if prompt_format.is_encoder_decoder:
                        rule = "an encoder-decoder has no loss on a text by itself"
                        raise refusal(option, spec, rule, "Use questions with answers")
                    texts = [pieces(t, prompt_format, max_length) for t in _texts(spec, columns)]
            except Refusal as error:  # as the option is called here
                raise Refusal(re.sub(r"^dataset(_kwargs)?=", f"{option}=", str(error))) from error
            if len(texts) == 1:
                texts = [[piece] for piece in texts[0]]
            texts = _some([text for text in texts if text], self.further_size, seed)
            examples = without_questions_of(examples, seen)
            if len(examples) + len(texts) < 2:
                count = f"{len(examples)} questions" if not texts else f"{len(texts)} texts"
                rule = f"leaves {count}, of which there is no standard error"
                raise refusal(option, spec, rule, "Give more, which training does not see")
            sets.append(FurtherSet(name, option, spec, examples, texts))
        return sets


def _check(option: str, spec: str) -> None:
    task = _TASK.fullmatch(spec)
    if task and task[2]:
        try:
            json.loads(task[2])
        except json.JSONDecodeError as error:
            cure = """Write it as reasoning_gym:TASK{"min_terms": 5}"""
            raise refusal(option, spec, f"its options are no JSON ({error})", cure) from error
    elif not task and spec.startswith("reasoning_gym:"):
        cure = """Write it as reasoning_gym:TASK or reasoning_gym:TASK{"min_terms": 5}"""
        raise refusal(option, spec, "names no task", cure)
    path = Path(_preset(spec)[1])
    looks_local = is_table(path) or path.suffix == ".txt" or str(path).startswith((".", "/"))
    if not task and looks_local and not path.exists():
        raise refusal(option, spec, "no such file or folder", "Check the path")


def _preset(spec: str) -> tuple[str, str]:
    """How the rows are read, and where they are."""
    name, colon, path = spec.partition(":")
    if name not in PRESETS:
        return "columns", spec
    return name, path if colon else PRESETS[name].path or name


def _questions(spec: str, columns: Columns, size: int | None, seed: int) -> list[Example] | None:
    """None where the data are texts."""
    if task := _TASK.fullmatch(spec):
        # As the test questions of a run are drawn (`DataOptions`): far from those trained on.
        return generate_examples(
            task[1], size or _GENERATED, 30_000_000 * seed, **json.loads(task[2] or "{}")
        )
    preset, path = _preset(spec)
    if preset == "columns" and not _has_questions(path, columns):
        return None
    for split in (PRESETS[preset].test_split, "train"):
        found = load_examples(path, split, preset=preset, columns=columns)
        if found is not None:
            return found if size is None else hold_out(found, size, seed)[1]
    return []


def _has_questions(path: str, columns: Columns) -> bool:
    if _is_text(path):
        return False
    row = next(_rows(path))
    return _TEXT not in row or columns.question in row


def _is_text(path: str) -> bool:
    return Path(path).is_file() and not is_table(path)


def _rows(path: str) -> Iterator[Any]:
    sources = open_split(path, "test") or open_split(path, "train") or []
    return (row for _, rows in sources for row in rows)


def _texts(path: str, columns: Columns) -> Iterable[str]:
    if not _is_text(path):
        for number, row in enumerate(_rows(path), 1):
            text = row.get(_TEXT)
            if not isinstance(text, str):
                rule = f"row {number} has no text in the column {_TEXT!r}"
                raise refusal("dataset", path, rule, "Write one there, or leave the row out")
            yield text
        return
    content = Path(path).read_bytes()
    try:
        yield content.decode(encoding_of(content[:4]))
    except UnicodeDecodeError as error:
        rule = f"it is no text, or in another encoding ({error})"
        raise refusal("dataset", path, rule, "Save it as UTF-8") from error


def _some(texts: list[Any], size: int | None, seed: int) -> list[Any]:
    """So many of them, in their order."""
    if size is None or size >= len(texts):
        return texts
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), size))]

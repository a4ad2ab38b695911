"""Pairs in the rows of a table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nso_hf.clip.pairs import Fields, Pair, Pairs, Share, text_of


class Table(Pairs):
    """Rows with an image and a caption: a list, or a dataset of the `datasets` library.

    Global batch t of a pass is positions t G to (t + 1) G of a random order of the rows, of which
    process p has the p-th part: the same batches for any number of processes and workers.
    """

    def __init__(
        self, name: str, rows: Sequence[Mapping[str, Any]], fields: Fields, folder: Path | None
    ) -> None:
        super().__init__(name)
        self._rows, self._fields, self._folder = rows, fields, folder

    def __len__(self) -> int:
        return len(self._rows)

    def shuffled(self, seed: Sequence[int], share: Share) -> Iterator[Pair]:
        order = np.random.default_rng(list(seed)).permutation(len(self))
        whole = share.batch_size * share.processes
        for position in range(len(order) // whole * whole):
            if share.has(position):
                yield self._pair(int(order[position]))

    def in_order(self, is_counted: bool = True) -> Iterator[Pair]:
        return (self._pair(index) for index in range(len(self)))

    def labels(self) -> list[str | None]:
        name = self._fields.label
        if hasattr(self._rows, "select_columns"):  # a dataset: without its images
            return [text_of(row[name]) for row in self._rows.select_columns([name])]
        return [text_of(row[name]) for row in self._rows] if name else []

    def _pair(self, index: int) -> Pair:
        row = self._rows[index]
        image = row[str(self._fields.image)]
        if isinstance(image, Mapping):  # as `datasets` stores an image it has not decoded
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str):
            image = Path(image)
            if self._folder is not None and (self._folder / image).exists():
                image = self._folder / image
        caption = row[self._fields.caption] if self._fields.caption else None
        label = row[self._fields.label] if self._fields.label else None
        return Pair(str(index), image, text_of(caption), text_of(label))

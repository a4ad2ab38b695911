"""Pairs in the rows of a table."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nso_hf.tasks.clip.pairs import Fields, Pair, Pairs, Share


class Table(Pairs):
    """Rows with an image and a caption: a list, or a dataset of the `datasets` library.

    Global batch t of a pass is positions t G to (t + 1) G of a random order of the rows, of which
    process p has the p-th part: the same batches for any number of processes and workers.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        fields: Fields,
        folder: Path | None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(name, classes)
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
        return [Pair.of("", None, label=label).label for label in self._column(self._fields.label)]

    def digest(self) -> str:
        """Of all captions and labels, and of a thousand of the images."""
        step = -(-len(self) // 1000)
        digest = hashlib.sha256(str(len(self)).encode())
        texts = (self._column(name) for name in (self._fields.caption, self._fields.label))
        images = (self._pair(index).image_key for index in range(0, len(self), step))
        for item in chain(*texts, images):
            digest.update(repr(item).encode() + b"\n")
        return digest.hexdigest()

    def _column(self, name: str | None) -> Iterator[Any]:
        if name is None:
            return
        if not hasattr(self._rows, "select_columns"):
            yield from (row[name] for row in self._rows)
            return
        for batch in self._rows.select_columns([name]).iter(10_000):  # a dataset: without images
            yield from batch[name]

    def _pair(self, index: int) -> Pair:
        row = self._rows[index]
        image = row[str(self._fields.image)]
        if isinstance(image, Mapping):  # as `datasets` stores an image it has not decoded
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str):
            image = Path(image)
            if self._folder is not None and (self._folder / image).exists():
                image = self._folder / image
        names = {"caption": self._fields.caption, "label": self._fields.label}
        return Pair.of(str(index), image, **{n: row[c] for n, c in names.items() if c})

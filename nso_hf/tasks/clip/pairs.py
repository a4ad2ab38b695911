"""Image-caption pairs: what a collection of them is, who reads which, and what was left out."""

import hashlib
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers.utils import logging

from nso_hf.tasks.clip.texts import NotText, text_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Pair:
    """One image and its caption, as stored."""

    key: str
    """Its name in the collection, wherever that is stored."""
    image: Any
    """Encoded bytes, a path, or a PIL image."""
    caption: str | None
    label: str | None = None
    """Its class, where it has one."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """"caption" or "label" -> why what stands there is no text."""

    @classmethod
    def of(cls, key: str, image: Any, **stored: Any) -> "Pair":
        """With a caption and a label of any type, as they are stored."""
        texts: dict[str, str | None] = {"caption": None}
        unreadable = {}
        for name, value in stored.items():
            try:
                texts[name] = text_of(value)
            except NotText as error:
                unreadable[name] = str(error)
        return cls(key, image, **texts, unreadable=unreadable)

    @property
    def image_key(self) -> str:
        """The same for pairs of one image: several captions of it."""
        if isinstance(self.image, bytes):
            return hashlib.blake2b(self.image, digest_size=16).hexdigest()
        if isinstance(self.image, Image.Image):
            return hashlib.blake2b(self.image.tobytes(), digest_size=16).hexdigest()
        return str(self.image)


@dataclass(frozen=True)
class Share:
    """Which part of the pairs one worker of one process reads."""

    process: int = 0
    processes: int = 1
    worker: int = 0
    workers: int = 1
    batch_size: int = 1

    @property
    def number(self) -> int:
        """Of this worker among those of all processes."""
        return self.worker * self.processes + self.process

    @property
    def readers(self) -> int:
        """Workers of all processes."""
        return self.processes * self.workers

    def has(self, position: int) -> bool:
        """Whether the pair at this position is its to read: batches are dealt to processes, then
        to their workers, as these yield them."""
        step, process = divmod(position // self.batch_size, self.processes)
        return process == self.process and step % self.workers == self.worker


@dataclass(frozen=True)
class Fields:
    """Names of what a pair is made of, in the rows of a table or the files of a shard."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


class Skipped:
    """How often an image, caption or shard could not be used: one count for all workers of this
    process."""

    KINDS = (
        "unreadable images",
        "missing images",
        "missing captions",
        "unreadable captions",
        "missing labels",
        "unreadable labels",
        "broken shards",
    )

    def __init__(self) -> None:
        self._counts = {kind: multiprocessing.Value("q", 0) for kind in self.KINDS}

    def add(self, kind: str, what: str) -> None:
        """Count one more; the first of its kind is warned of."""
        count = self._counts[kind]
        with count.get_lock():
            count.value += 1
            is_first = count.value == 1
        if is_first:
            logger.warning(f"Skipped, with any further {kind}: {what}")

    def reset(self) -> None:
        """Count from zero."""
        for count in self._counts.values():
            count.value = 0

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how often, of those that occurred."""
        return {kind: int(count.value) for kind, count in self._counts.items() if count.value}

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items())


class Pairs(ABC):
    """A collection of pairs.

    `skipped` counts what its readers left out; `classes` are all that its labels may have, where
    that is known.
    """

    def __init__(self, name: str, classes: Sequence[str] = ()) -> None:
        self.name, self.classes = name, classes
        self.skipped = Skipped()

    @abstractmethod
    def __len__(self) -> int:
        """How many there are, those that will be skipped included."""

    @abstractmethod
    def digest(self) -> str:
        """Of what it holds: another one, in all likelihood, for other data."""

    @abstractmethod
    def shuffled(self, seed: Sequence[int], share: Share) -> Iterator[Pair]:
        """One pass over the pairs of a share, in an order that is a function of `seed`."""

    @abstractmethod
    def in_order(self, is_counted: bool = True) -> Iterator[Pair]:
        """All pairs in their order. Only one of several readers counts what is broken."""

    def __iter__(self) -> Iterator[Pair]:
        return self.in_order()

    def labels(self) -> list[str | None]:
        """The classes of all, in their order."""
        return [pair.label for pair in self]

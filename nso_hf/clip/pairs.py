"""Where image-caption pairs come from: webdataset shards, tables of rows, and what was left out."""

import csv
import hashlib
import json
import multiprocessing
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from nso_hf.refusal import Refusal, refusal

logger = logging.get_logger(__name__)

_IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_FEW = 64  # shards that each reader can go through in an epoch
_SHUFFLED = 5000  # encoded pairs held back, from which the next one is drawn


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
        "missing labels",
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


class Pairs(ABC):
    """A collection of pairs.

    `skipped` counts what its readers left out.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped = Skipped()

    @abstractmethod
    def __len__(self) -> int:
        """How many there are, those that will be skipped included."""

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
            return [_text(row[name]) for row in self._rows.select_columns([name])]
        return [_text(row[name]) for row in self._rows] if name else []

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
        return Pair(str(index), image, _text(caption), _text(label))


class Shards(Pairs):
    """Tar files of the webdataset library: `key.png`, `key.txt`, `key.json`, ...

    Shards are dealt to processes and their workers. Where they are fewer than these, or few and no
    multiple of their number, every one reads all shards and keeps the batches that are its own:
    some would run out of pairs otherwise.

    Args:
        urls: with braces, as `cc3m-{000..331}.tar`; several joined by `::`.
        num_pairs: how many pairs they hold; without it, `sizes.json` or `__len__` beside them says
            it (open_clip's convention), or local files are counted.
    """

    def __init__(self, urls: str, fields: Fields, num_pairs: int | None = None) -> None:
        super().__init__(urls)
        from webdataset.shardlists import expand_urls

        self._urls = [url for part in urls.split("::") for url in expand_urls(part)]
        self._fields = fields
        for url in self._urls:
            if _is_local(url) and not Path(url).is_file():
                rule = f"shard {url} does not exist ({len(self._urls)} shards are named)"
                raise refusal("data", urls, rule, "Check the path and the numbers in braces")
        self._num_pairs = num_pairs if num_pairs is not None else self._counted()
        if not self._num_pairs:
            raise refusal("data", urls, "no pair can be read in these shards", "Check the files")

    def __len__(self) -> int:
        return self._num_pairs

    def shuffled(self, seed: Sequence[int], share: Share) -> Iterator[Pair]:
        import random

        from webdataset.filters import _shuffle

        order = np.random.default_rng(list(seed)).permutation(len(self._urls))
        urls = [self._urls[index] for index in order]
        is_even = len(urls) % share.readers == 0
        if len(urls) >= share.readers and (is_even or len(urls) > _FEW):
            mine = self._read(urls[share.number :: share.readers])
        else:
            every = self._read(urls, is_counted=share.number == 0)
            mine = (pair for position, pair in enumerate(every) if share.has(position))
        rng = random.Random(f"{seed} {share.number}")
        shuffled: Iterator[Pair] = _shuffle(mine, _SHUFFLED, _SHUFFLED // 5, rng)
        return shuffled

    def in_order(self, is_counted: bool = True) -> Iterator[Pair]:
        return self._read(self._urls, is_counted)

    def _read(self, urls: Sequence[str], is_counted: bool = True) -> Iterator[Pair]:
        from webdataset.tariterators import tarfile_samples

        broken = set()
        for url in urls:

            def skip(error: Exception, url: str = url) -> bool:
                if url not in broken and is_counted:  # one is an error at several places
                    self.skipped.add("broken shards", f"{url} ({error})")
                broken.add(url)
                return True

            for sample in tarfile_samples([{"url": url}], handler=skip):
                yield self._pair(url, sample)
            if url not in broken and not _has_an_end(url):
                skip(EOFError("it has no end, as one that was cut off"))

    def _pair(self, url: str, sample: Mapping[str, Any]) -> Pair:
        names = [self._fields.image] if self._fields.image else _IMAGE_SUFFIXES
        image = next((sample[name] for name in names if name in sample), None)
        caption = _field(sample, self._fields.caption or "txt")
        label = _field(sample, self._fields.label) if self._fields.label else None
        return Pair(f"{Path(url).name}/{sample['__key__']}", image, caption, label)

    def _counted(self) -> int:
        folder = Path(self._urls[0]).parent
        sizes, length = folder / "sizes.json", folder / "__len__"
        if _is_local(self._urls[0]) and sizes.is_file():
            known = json.loads(sizes.read_text())
            if all(Path(url).name in known for url in self._urls):
                return sum(int(known[Path(url).name]) for url in self._urls)
        if _is_local(self._urls[0]) and length.is_file():
            return int(length.read_text())
        if not all(map(_is_local, self._urls)):
            cure = "Give their number, --train_num_pairs"
            raise refusal("data", self.name, "how many pairs remote shards hold is unknown", cure)
        return sum(_pairs_in(Path(url)) for url in self._urls)


def _is_local(url: str) -> bool:
    return not re.match(r"[a-z0-9]+:", url)


def _pairs_in(shard: Path) -> int:
    """The number of different keys among the files of a shard, as far as it can be read."""
    import tarfile

    from webdataset.tariterators import base_plus_ext

    keys = set()
    try:
        with tarfile.open(shard) as files:
            for file in files:
                keys.add(base_plus_ext(file.name)[0])
    except (tarfile.TarError, OSError, EOFError):
        pass  # reading it counts it as broken
    return len(keys - {None})


def _has_an_end(url: str) -> bool:
    """Whether a local tar file ends with the two blocks of zeros that close it."""
    if not (_is_local(url) and url.endswith(".tar")):
        return True
    with Path(url).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1024))
        return size >= 1024 and not any(file.read())


def _field(sample: Mapping[str, Any], name: str) -> str | None:
    """A text among the files of a sample: `name`, or an entry of its json file."""
    if name in sample:
        return bytes(sample[name]).decode(errors="replace")
    if "json" in sample:
        try:
            entries = json.loads(sample["json"])
        except ValueError:
            return None
        return _text(entries.get(name)) if isinstance(entries, dict) else None
    return None


def _text(value: Any) -> str | None:
    return None if value is None or value != value else str(value)  # not a number: an empty cell


def read_image(image: Any) -> Image.Image:
    """The image in RGB, of bytes, a path, or a PIL image.

    Raises:
        Exception: whatever its decoder finds wrong with it.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return opened.convert("RGB")


def open_pairs(
    data: str,
    fields: Fields,
    *,
    split: str = "train",
    config: str | None = None,
    csv_separator: str = "\t",
    num_pairs: int | None = None,
) -> Pairs:
    """The pairs that `data` names: shards (`.tar`), a `.csv` or `.tsv` file, a folder of shards or
    of images, or a dataset on the hub.

    Raises:
        ValueError: it does not exist, or has no column of that name.
    """
    path = Path(data)
    if re.search(r"\.tar(\.\w+)?(::|$)", data) or data.startswith("pipe:"):
        return Shards(data, fields, num_pairs)
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))):
        return Shards("::".join(map(str, shards)), fields, num_pairs)
    if num_pairs is not None:
        raise refusal("train_num_pairs", num_pairs, f"{data} is no shard", "Leave it out")
    is_table = path.suffix in (".csv", ".tsv")
    if not path.exists() and (is_table or data.startswith((".", "/"))):
        raise refusal("data", data, "no such file or folder", "Check the path")
    return _open_table(data, fields, split, config, csv_separator)


def _open_table(
    data: str, fields: Fields, split: str, config: str | None, csv_separator: str
) -> Table:
    import datasets

    path, folder = Path(data), None
    defaults = Fields("image", "text", None)
    if path.suffix in (".csv", ".tsv"):
        defaults, folder = Fields("filepath", "title", None), path.parent
    try:
        rows = _rows(path, data, split, config, csv_separator)
    except Exception as error:  # not there, no network, no such split, no table: of many kinds
        if isinstance(error, Refusal):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        cure = "Check the path or id, the split and the network"
        raise refusal("data", data, reason, cure) from error
    fields = Fields(
        fields.image or defaults.image, fields.caption or defaults.caption, fields.label
    )
    for name in (fields.image, fields.label):
        if name is not None and name not in rows.column_names:
            columns = ", ".join(rows.column_names)
            cure = "Name one of them" if len(rows.column_names) > 1 else "Set --csv_separator"
            raise refusal("column", name, f"not in {data}, which has {columns}", cure)
    if fields.caption not in rows.column_names:
        if fields.label is None:
            columns = ", ".join(rows.column_names)
            rule = f"not in {data}, which has {columns}"
            raise refusal("caption_column", fields.caption, rule, "Name one of them")
        fields = Fields(fields.image, None, fields.label)  # images with classes alone
    if isinstance(rows.features[fields.image], datasets.Image):
        rows = rows.cast_column(fields.image, datasets.Image(decode=False))
    if fields.label and isinstance(rows.features[fields.label], datasets.ClassLabel):
        names = rows.features[fields.label].names
        labels = [names[number] if number >= 0 else None for number in rows[fields.label]]
        rows = rows.remove_columns(fields.label).add_column(fields.label, labels)
    if fields.caption and isinstance(rows.features[fields.caption], (list, datasets.List)):
        cure = "Write one row for each caption, or name another column"
        raise refusal("caption_column", fields.caption, "holds lists", cure)
    return Table(data, rows, fields, folder)


def _rows(path: Path, data: str, split: str, config: str | None, csv_separator: str) -> Any:
    import datasets

    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else csv_separator
        with path.open(newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
            lines = sum(bool(line.strip()) for line in file)
        # As they are written: "null" is a caption, 000 a class.
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"delimiter": separator, "features": features, "keep_default_na": False}
        rows = datasets.load_dataset("csv", data_files=data, split="train", **options)
        if len(rows) != lines:
            logger.warning(f"{data}: {lines} lines make {len(rows)} rows; check the quotes in it")
        return rows
    if (path / "dataset_info.json").is_file():
        return datasets.load_from_disk(data)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(data)[split]
    if path.is_dir() and any(path.rglob("*.parquet")):
        return datasets.load_dataset(data, split=split)
    if path.is_dir():
        return _image_folder(path, split)
    return datasets.load_dataset(data, config, split=split)


def _image_folder(path: Path, split: str) -> Any:
    """A folder of images with metadata.csv, or with a folder for each class, or with such folders
    named after splits."""
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(path))
    if split not in found and len(found) > 1:
        raise refusal("split", split, f"not in {path}, which has {', '.join(found)}", "Name one")
    return found[split] if split in found else next(iter(found.values()))

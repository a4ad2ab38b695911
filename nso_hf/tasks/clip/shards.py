"""Pairs in the tar files of the webdataset library, read as streams."""

import hashlib
import json
import random
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nso_hf.refusal import refusal
from nso_hf.running.tables import WrittenNumber
from nso_hf.tasks.clip.pairs import Fields, Pair, Pairs, Share
from nso_hf.tasks.clip.texts import NotText

_IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_FEW = 64  # shards that each reader can go through in an epoch
_SHUFFLED = 5000  # encoded pairs held back, from which the next one is drawn


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
                if "*" in url or "?" in url:
                    cure = "Give their folder, or numbers in braces"
                    raise refusal("data", urls, "* and ? are not expanded", cure)
                rule = f"shard {url} does not exist ({len(self._urls)} named)"
                raise refusal("data", urls, rule, "Check the path and the numbers in braces")
        self._num_pairs = num_pairs if num_pairs is not None else self._counted()
        if self._num_pairs == 0:
            raise refusal("data", urls, "no pair can be read in these shards", "Check the files")

    def __len__(self) -> int:
        if self._num_pairs is None:
            cure = "Give their number, --train_num_pairs"
            raise refusal("data", self.name, "how many pairs remote shards hold is unknown", cure)
        return self._num_pairs

    def digest(self) -> str:
        """Of the names of the shards, and of their sizes where they are local."""
        sizes = [(url, Path(url).stat().st_size if _is_local(url) else 0) for url in self._urls]
        return hashlib.sha256(repr((sizes, self._num_pairs)).encode()).hexdigest()

    def shuffled(self, seed: Sequence[int], share: Share) -> Iterator[Pair]:
        from webdataset.filters import shuffle

        order = np.random.default_rng(list(seed)).permutation(len(self._urls))
        urls = [self._urls[index] for index in order]
        is_even = len(urls) % share.readers == 0
        if len(urls) >= share.readers and (is_even or len(urls) > _FEW):
            mine = self._read(urls[share.number :: share.readers])
        else:
            every = self._read(urls, is_counted=share.number == 0)
            mine = (pair for position, pair in enumerate(every) if share.has(position))
        rng = random.Random(f"{seed} {share.number}")
        shuffled: Iterator[Pair] = shuffle(_SHUFFLED, initial=_SHUFFLED // 5, rng=rng)(mine)
        return shuffled

    def in_order(self, is_counted: bool = True) -> Iterator[Pair]:
        return self._read(self._urls, is_counted)

    def _read(self, urls: Sequence[str], is_counted: bool = True) -> Iterator[Pair]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        broken = set()
        for url in urls:

            def skip(error: Exception, url: str = url) -> bool:
                if url not in broken and is_counted:  # one is an error at several places
                    self.skipped.add("broken shards", f"{url} ({error})")
                broken.add(url)
                return True

            try:
                stream = gopen(url)
            except OSError as error:
                skip(error)
                continue
            with closing(stream):
                source = {"url": url, "stream": stream}
                for sample in group_by_keys(
                    tar_file_expander([source], handler=skip), handler=skip
                ):
                    yield self._pair(url, sample)
            if url not in broken and not _has_an_end(url):
                skip(EOFError("it has no end, as one that was cut off"))

    def _pair(self, url: str, sample: Mapping[str, Any]) -> Pair:
        names = [self._fields.image] if self._fields.image else _IMAGE_SUFFIXES
        image = next((sample[name] for name in names if name in sample), None)
        caption = _field(sample, self._fields.caption or "txt")
        label = _field(sample, self._fields.label) if self._fields.label else None
        key = f"{Path(url).name}/{sample['__key__']}"
        return Pair.of(key, image, caption=caption, label=label)

    def _counted(self) -> int | None:
        folder = Path(self._urls[0]).parent
        sizes, length = folder / "sizes.json", folder / "__len__"
        if _is_local(self._urls[0]) and sizes.is_file():
            known = json.loads(sizes.read_text(encoding="utf-8"))
            if all(Path(url).name in known for url in self._urls):
                return sum(int(known[Path(url).name]) for url in self._urls)
        if _is_local(self._urls[0]) and length.is_file():
            return int(length.read_text(encoding="utf-8"))
        if not all(map(_is_local, self._urls)):
            return None
        counting = tqdm(self._urls, desc="Counting pairs in shards", delay=3, leave=False)
        return sum(_pairs_in(Path(url)) for url in counting)


def _is_local(url: str) -> bool:
    return not re.match(r"[a-z0-9]+:", url)


def _pairs_in(shard: Path) -> int:
    """The number of different keys among the files of a shard, as far as it can be read."""
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


def _field(sample: Mapping[str, Any], name: str) -> Any:
    """One of the files of a sample, or an entry of its json file."""
    if name in sample or "json" not in sample:
        return sample.get(name)
    try:
        # A number as it is written.
        entries = json.loads(sample["json"], parse_float=WrittenNumber)
    except (ValueError, RecursionError):
        return NotText("its json file is broken")
    return entries.get(name) if isinstance(entries, dict) else None

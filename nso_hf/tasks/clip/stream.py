"""Pairs on their way into batches: dealt, shuffled, decoded, augmented, or left out."""

import random
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from nso_hf.refusal import Refusal, refusal
from nso_hf.step.side_effects import random_state_kept
from nso_hf.tasks.clip.pairs import Pair, Pairs, Share
from nso_hf.tasks.images.reading import read_image

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class PairStream(IterableDataset[dict[str, Tensor]]):
    """The training pairs of one process: `image` (3, H, W) and `text` (context length,).

    What an epoch yields is a function of the seed, the epoch and the pairs alone, augmentation
    included: a run that goes on from a checkpoint sees what it would have seen. Each process
    yields the same number: where pairs are skipped, or a reader has fewer than the others, the
    first of another pass take their place.

    Args:
        pairs: where they come from.
        transform: PIL image to tensor; its random numbers are seeded for each image.
        tokenizer: texts to tokens, (n, context length).
        batch_size: pairs of this process in a micro-batch.
        micro_batches: of an optimizer step; an epoch is a whole number of steps, so that none of
            them has fewer negatives.
        process, processes: which of how many this one is.

    Raises:
        ValueError: there are fewer pairs than in a batch of all processes.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        micro_batches: int = 1,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.pairs, self.transform, self.tokenizer = pairs, transform, tokenizer
        self.batch_size, self._micro_batches, self._seed = batch_size, micro_batches, seed
        self._process, self._processes = process, processes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may live on
        if not len(self):
            size = f"{batch_size} x {processes} x {micro_batches}"
            rule = f"has {len(pairs)} pairs, fewer than the batch of an optimizer step, {size}"
            cure = "Lower --per_device_train_batch_size or --gradient_accumulation_steps"
            raise refusal("train_data", pairs.name, rule, cure)

    def __len__(self) -> int:
        batch = self.batch_size * self._micro_batches
        return len(self.pairs) // (batch * self._processes) * batch

    def undealt(self) -> "PairStream":
        """The same pairs in the order of one process, in its first epoch."""
        size, seed = self.batch_size, self._seed
        return PairStream(self.pairs, self.transform, self.tokenizer, batch_size=size, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        share = Share(self._process, self._processes, worker, workers, self.batch_size)
        epoch = int(self._epoch)
        batches = len(range(worker, len(self) // self.batch_size, workers))
        left = batches * self.batch_size
        for lap in count():
            before = left
            for pair in self.pairs.shuffled((self._seed, epoch, lap), share):
                if left == 0:
                    return
                image = usable(pair, self.pairs)
                if image is not None:
                    left -= 1
                    yield self._example(pair, image, f"{self._seed} {epoch} {lap} {pair.key}")
            if left == 0:
                return
            if left == before:
                raise nothing_usable(self.pairs)

    def _example(self, pair: Pair, image: Image.Image, seed: str) -> dict[str, Tensor]:
        with random_state_kept(set()):
            number = zlib.crc32(seed.encode())
            torch.default_generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number)
            tensor = self.transform(image)
        assert pair.caption is not None
        return {"image": tensor, "text": self.tokenizer([pair.caption])[0]}


def usable(pair: Pair, pairs: Pairs, needs: str = "caption") -> Image.Image | None:
    """The decoded image of a pair that has it and a caption (or a label); else it is counted as
    skipped."""
    skipped = pairs.skipped
    if pair.image is None:
        skipped.add("missing images", pair.key)
        return None
    text = getattr(pair, needs)
    if needs in pair.unreadable:
        skipped.add(f"unreadable {needs}s", f"{pair.key} ({pair.unreadable[needs]})")
        return None
    if text is None or not text.strip():
        skipped.add(f"missing {needs}s", pair.key)
        return None
    try:
        return read_image(pair.image)
    except Exception as error:  # decoders raise what they like
        skipped.add("unreadable images", f"{pair.key} ({error})")
        return None


def check_usable(pairs: Pairs, needs: str = "caption") -> None:
    """
    Raises:
        ValueError: not one of the pairs can be used.
    """
    if not any(usable(pair, pairs, needs) for pair in pairs):
        raise nothing_usable(pairs)
    pairs.skipped.reset()


def nothing_usable(pairs: Pairs) -> Refusal:
    rule = f"nothing of it could be used (skipped: {pairs.skipped})"
    return refusal("data", pairs.name, rule, "Check the files, columns and captions")


class EvaluationStream(IterableDataset[Any]):
    """The pairs of one process for evaluation, in rounds: `round_size` pairs of the collection for
    each process in turn, of which a round holds those that can be used, possibly none.

    Every process gets the same number of rounds, as sharded weights require.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        tokenizer: Tokenizer | None,
        *,
        round_size: int,
        process: int = 0,
        processes: int = 1,
        needs: str = "caption",
    ) -> None:
        super().__init__()
        self._pairs, self._transform, self._tokenizer = pairs, transform, tokenizer
        self._size, self._needs = round_size, needs
        self._process, self._processes = process, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine: list[tuple[int, Pair]] = []
        number = 0  # of the round
        index = -1
        is_counted = self._process == worker == 0
        for index, pair in enumerate(self._pairs.in_order(is_counted)):
            at, within = divmod(index, self._size * self._processes)
            if at > number:
                if number % workers == worker:
                    yield self._round(mine)
                mine, number = [], at
            if within // self._size == self._process and number % workers == worker:
                mine.append((index, pair))
        if index >= 0 and number % workers == worker:
            yield self._round(mine)

    def _round(self, mine: list[tuple[int, Pair]]) -> dict[str, Any]:
        decoded = [(i, p, usable(p, self._pairs, self._needs)) for i, p in mine]
        kept = [(index, pair, image) for index, pair, image in decoded if image is not None]
        batch: dict[str, Any] = {
            "index": [index for index, _, _ in kept],
            "pair": [(pair.image_key, pair.caption, pair.label) for _, pair, _ in kept],
        }
        if kept:
            batch["image"] = torch.stack([self._transform(image) for _, _, image in kept])
            if self._tokenizer is not None:
                batch["text"] = self._tokenizer([str(pair.caption) for _, pair, _ in kept])
        return batch

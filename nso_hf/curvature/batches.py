"""The first batches of a Trainer's data, made without a trace of it in the training."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from transformers import Trainer

from nso_hf.refusal import refusal
from nso_hf.step.side_effects import random_state_kept

Batch = Mapping[str, Any]

_MANY = 1000  # elements of a container that is taken for data, not for state


def examples_of(batch: Batch) -> int:
    """How many there are in it."""
    tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    return next((len(tensor) for tensor in tensors), 1)


def training_batches(trainer: Trainer, num_batches: int | None = None) -> list[Batch]:
    """The first `num_batches` batches (None: all) of the training data in their order, made by the
    trainer's own loader and collator; their size is `per_device_train_batch_size`. What is random
    in making them (masks, augmentation) is the same in every call and process.

    They are made from a copy, but for the rows, of the data set and the collator: generators and
    streams that these hold do not move.

    Raises:
        ValueError: the data cannot be copied, or cannot be read twice.
    """
    if trainer.train_dataset is None:
        raise refusal("train_dataset", None, "the trainer has no data", "Pass batches")
    with random_state_kept({trainer.args.device}):
        loader = _own_loader(trainer)
        batches = _drawn(loader, trainer, num_batches)
        again = _drawn(loader, trainer, 1)
    if not _equal(batches[:1], again):
        rule = "read twice, it gave different batches: its state cannot be put back"
        raise refusal("train_dataset", _name(trainer), rule, "Pass batches")
    return batches


def _own_loader(trainer: Trainer) -> DataLoader[Any]:
    """The trainer's loader before it is dealt to processes."""
    kept = dict(vars(trainer))
    with _unprepared(trainer.accelerator):
        loader = trainer.get_train_dataloader()
    vars(trainer).clear()
    vars(trainer).update(kept)  # some trainers remember the loader they made last
    return loader


@contextmanager
def _unprepared(accelerator: Any) -> Iterator[None]:
    even = accelerator.even_batches  # some trainers set it
    accelerator.prepare = lambda loader: loader
    try:
        yield
    finally:
        del accelerator.prepare
        accelerator.even_batches = even


def _drawn(loader: DataLoader[Any], trainer: Trainer, number: int | None) -> list[Batch]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return [dict(batch) for batch in islice(_copied(loader, trainer), number)]


def _copied(loader: DataLoader[Any], trainer: Trainer) -> Iterable[Batch]:
    """A loader of a copy of the data set: in its order, but where an own sampler makes batches."""
    model: Any = trainer.model
    shared = [trainer, *model.modules(), *_data(loader.dataset)]
    memo = {id(thing): thing for thing in shared}
    parts = (loader.dataset, loader.collate_fn, loader.batch_sampler)
    try:
        dataset, collate, sampler = copy.deepcopy(parts, memo)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        rule = f"it cannot be copied, and reading it would take from the training ({error})"
        raise refusal("train_dataset", _name(trainer), rule, "Pass batches") from error
    options: dict[str, Any] = {"collate_fn": lambda rows: collate(copy.deepcopy(rows))}
    if isinstance(dataset, IterableDataset) or type(sampler) is BatchSampler:
        options["batch_size"] = trainer.args.per_device_train_batch_size
    else:
        options["batch_sampler"] = sampler
    return DataLoader(dataset, **options)


def _data(thing: Any, depth: int = 4) -> Iterator[Any]:
    """What a data set holds its rows in: tensors, arrays and long containers. Depth: of wrappers
    of data sets, such as subsets."""
    if isinstance(thing, (Tensor, np.ndarray)) or (
        isinstance(thing, (list, tuple, dict)) and len(thing) >= _MANY
    ):
        yield thing
    elif depth and hasattr(thing, "__dict__"):
        for value in vars(thing).values():
            yield from _data(value, depth - 1)
    elif depth and isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _data(value, depth - 1)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, type(b)) and (not isinstance(a, (str, int, float, bool)) or a == b)


def _name(trainer: Trainer) -> str:
    return type(trainer.train_dataset).__name__

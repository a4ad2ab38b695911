"""Features of whole collections of images and texts, encoded by all processes together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from nso_hf.refusal import Refusal
from nso_hf.tasks.clip.loss import loss_of
from nso_hf.tasks.clip.models import ClipModel
from nso_hf.tasks.clip.pairs import Pairs
from nso_hf.tasks.clip.stream import EvaluationStream, nothing_usable

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Features of a collection, in its order, without what had to be skipped."""

    images: Tensor
    """(n, D), normalised, float32 on the CPU."""
    texts: Tensor | None
    """(n, D), of the captions."""
    keys: list[str]
    captions: list[str | None]
    labels: list[str | None]
    index: list[int]
    """Positions in the collection."""
    loss: float
    """Mean contrastive loss over batches, weighted by their size; nan without captions."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, numbers: Sequence[int]) -> "Encoded":
        """Some of the examples alone; the loss stays that of all."""
        return replace(
            self,
            images=self.images[numbers],
            texts=None if self.texts is None else self.texts[numbers],
            keys=[self.keys[n] for n in numbers],
            captions=[self.captions[n] for n in numbers],
            labels=[self.labels[n] for n in numbers],
            index=[self.index[n] for n in numbers],
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def encode(
    model: nn.Module,
    clip: ClipModel,
    pairs: Pairs,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
    loss: nn.Module | None = None,
    needs: str = "caption",
) -> Encoded:
    """Encode a collection, its batches being dealt over the processes; each gets all features.

    Args:
        model: what to call; its mode is left as it was.
        loss: of one process, for pairs; None: images alone.
        needs: "caption" or "label": what an example must have not to be skipped.

    Raises:
        ValueError: nothing of it can be used.
    """
    stream = EvaluationStream(
        pairs,
        clip.eval_transform,
        clip.tokenizer if loss is not None else None,
        round_size=batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        needs=needs,
    )
    try:
        rounds = -(-len(pairs) // (batch_size * accelerator.num_processes))
    except Refusal:  # of remote shards: the bar has no end
        rounds = None
    own = torch.Generator()  # or it would draw from the global one, and training go on otherwise
    loader = DataLoader(stream, batch_size=None, num_workers=workers, generator=own)
    size = image_size(clip.model)
    hidden = not accelerator.is_local_main_process
    found: list[dict[str, Any]] = []
    pairs.skipped.reset()
    progress = tqdm(total=rounds, desc="Encoding", disable=hidden, leave=False)
    with evaluating(model), progress as bar:
        for batch in loader:  # given to the bar, its workers would be started twice
            bar.update()
            is_empty = not batch["index"]  # all processes take part in every pass
            image = torch.zeros(1, 3, *size) if is_empty else batch["image"]
            inputs = {"image": image.to(accelerator.device)}
            if loss is not None:
                text = clip.tokenizer(["nothing"]) if is_empty else batch["text"]
                inputs["text"] = text.to(accelerator.device)
            outputs = model(**inputs)
            if is_empty:
                continue
            entry = {"index": batch["index"], "pair": batch["pair"], "loss": float("nan")}
            entry["images"] = outputs["image_features"].float().cpu()
            if loss is not None:
                entry["texts"] = outputs["text_features"].float().cpu()
                entry["loss"] = loss_of(loss, outputs).item()
            found.append(entry)
    if not all(entry["images"].isfinite().all() for entry in found):
        logger.warning("Features are not finite: the model has diverged, and counts as wrong.")
    every = sorted(gather_object(found), key=lambda entry: entry["index"][0])
    if not every:
        raise nothing_usable(pairs)
    named = [pair for entry in every for pair in entry["pair"]]
    sizes = np.array([len(entry["index"]) for entry in every])
    losses = np.array([entry["loss"] for entry in every])
    return Encoded(
        images=torch.cat([entry["images"] for entry in every]),
        texts=torch.cat([entry["texts"] for entry in every]) if loss is not None else None,
        keys=[key for key, _, _ in named],
        captions=[caption for _, caption, _ in named],
        labels=[label for _, _, label in named],
        index=[index for entry in every for index in entry["index"]],
        loss=float((losses * sizes).sum() / sizes.sum()),
    )


def image_size(model: nn.Module) -> tuple[int, int]:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)

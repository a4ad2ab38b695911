"""What a contrastive model knows: retrieval, zero-shot classification, a linear probe."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from open_clip import CoCa, build_zero_shot_classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from nso_hf.clip.models import ClipModel, loss_of, text_features
from nso_hf.clip.pairs import Pairs
from nso_hf.clip.stream import EvaluationStream, nothing_usable
from nso_hf.refusal import refusal

logger = logging.get_logger(__name__)

_CHUNK = 1024  # queries compared with all candidates at a time
RECALLS = (1, 5, 10)
METRICS = [
    f"{direction}_{measure}"
    for direction in ("image_to_text", "text_to_image")
    for measure in (*(f"recall@{k}" for k in RECALLS), "mean_rank", "median_rank")
]
"""The names of what `Retrieval.metrics` has."""


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
def _evaluating(model: nn.Module) -> Iterator[None]:
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
    rounds = -(-len(pairs) // (batch_size * accelerator.num_processes))
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    size = _image_size(clip.model)
    hidden = not accelerator.is_local_main_process
    found: list[dict[str, Any]] = []
    pairs.skipped.reset()
    progress = tqdm(total=rounds, desc="Encoding", disable=hidden, leave=False)
    with _evaluating(model), progress as bar:
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


def _image_size(model: nn.Module) -> tuple[int, int]:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


@dataclass(frozen=True)
class Retrieval:
    """Where, among all candidates, the first right one came for each query: 1 is first."""

    image_to_text: Tensor
    text_to_image: Tensor
    right: tuple[Tensor, Tensor]
    """How many candidates are right for each query, in both directions."""
    candidates: tuple[int, int]
    """Texts and images to choose from."""

    @property
    def metrics(self) -> dict[str, float]:
        """Recall at 1, 5 and 10 in [0, 1], mean and median rank, in both directions."""
        named = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        metrics = {}
        for name, ranks in named.items():
            for k in RECALLS:
                metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
            metrics[f"{name}_mean_rank"] = ranks.double().mean().item()
            metrics[f"{name}_median_rank"] = float(np.median(ranks.numpy()))
        return metrics

    @property
    def chance(self) -> dict[str, float]:
        """What random rankings are expected to give."""
        chance = {}
        directions = ("image_to_text", "text_to_image")
        for name, right, n in zip(directions, self.right, self.candidates, strict=True):
            for k in RECALLS:
                missed = torch.ones(len(right), dtype=torch.double)
                for i in range(min(k, n)):
                    missed *= (1 - right.double() / (n - i)).clamp(min=0)
                chance[f"{name}_recall@{k}"] = 1 - missed.mean().item()
            chance[f"{name}_mean_rank"] = ((n + 1) / (right.double() + 1)).mean().item()
        return chance


@torch.no_grad()
def retrieval(encoded: Encoded, device: torch.device | str = "cpu") -> Retrieval:
    """Rank all texts for each image, and all images for each text.

    Images of one key, and equal captions, are one candidate; any of the captions of an image is
    right for it, and any of the images of a caption. A wrong candidate that scores like the best
    right one counts as before it: a model that maps everything to one point comes last, not first.
    """
    assert encoded.texts is not None
    keys, image_of = np.unique(encoded.keys, return_index=False, return_inverse=True)
    captions, text_of = np.unique(
        np.array(encoded.captions, dtype=object).astype(str), return_inverse=True
    )
    first_image = _first(image_of, len(keys))
    first_text = _first(text_of, len(captions))
    images = encoded.images[first_image].to(device)
    texts = encoded.texts[first_text].to(device)
    links = torch.from_numpy(np.unique(np.stack([image_of, text_of]), axis=1))
    return Retrieval(
        image_to_text=_ranks(images, texts, links[0], links[1]),
        text_to_image=_ranks(texts, images, links[1], links[0]),
        right=(torch.bincount(links[0]), torch.bincount(links[1])),
        candidates=(len(texts), len(images)),
    )


def _first(groups: np.ndarray, number: int) -> Tensor:
    first = np.full(number, len(groups))
    np.minimum.at(first, groups, np.arange(len(groups)))
    return torch.from_numpy(first)


def _ranks(queries: Tensor, candidates: Tensor, query_of: Tensor, right: Tensor) -> Tensor:
    order = query_of.argsort(stable=True)
    query_of, right = query_of[order], right[order]
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ candidates.T
        here = slice(*torch.searchsorted(query_of, torch.tensor([start, start + _CHUNK])).tolist())
        rows = (query_of[here] - start).to(scores.device)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[rows, right[here].to(scores.device)] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        is_before = ~(scores < best) & ~is_right  # a score that is no number too
        ranks.append(1 + is_before.sum(dim=1).cpu())
    return torch.cat(ranks)


@dataclass(frozen=True)
class Classification:
    """How well images are told apart by a name for each class."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    mean_per_class: float
    """Top-1 accuracy, averaged over classes."""
    chance: float
    majority: float
    """What always naming the most frequent class gives."""
    classes: int
    images: int
    stderr: float
    """Binomial, of top1."""


def class_names(labels: Sequence[str | None], name: str) -> list[str]:
    """The classes that occur, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = sorted({label for label in labels if label is not None})
    if len(classes) < 2:
        found = f"the one class {classes[0]}" if classes else "no class"
        rule = f"its images have {found}: nothing is to be told apart"
        cure = "Use images of two classes or more, or name another column"
        raise refusal("labels", name, rule, cure)
    return classes


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    clip: ClipModel,
    encoded: Encoded,
    classes: Sequence[str],
    templates: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    device: torch.device | str,
    classes_per_batch: int = 10,
) -> tuple[Classification, Tensor]:
    """Classify encoded images by the texts that `templates` make of each class (open_clip's
    `build_zero_shot_classifier`). All processes have to call it.

    Args:
        classes: as the images' labels have them.
        names: for the prompts, one for each class.

    Returns:
        The accuracy, and the predicted class of each image (n,).
    """
    with _evaluating(model):
        classifier = build_zero_shot_classifier(
            _Texts(model, clip),
            clip.tokenizer,
            list(names or classes),
            list(templates),
            num_classes_per_batch=classes_per_batch,
            device=device,
        )
    number = {label: index for index, label in enumerate(classes)}
    target = torch.tensor([number[str(label)] for label in encoded.labels])
    k = min(5, len(classes))
    weights = classifier.float()
    ranked = torch.cat(
        [
            (chunk.to(weights.device) @ weights).topk(k, dim=1).indices.cpu()
            for chunk in encoded.images.split(_CHUNK)
        ]
    )
    ranked[~encoded.images.isfinite().all(dim=1)] = -1  # of no class
    if not weights.isfinite().all():
        ranked[:] = -1
    top5 = (ranked == target[:, None]).any(dim=1) if len(classes) > 5 else None
    return _classification(ranked[:, 0], target, len(classes), top5), ranked[:, 0]


def _classification(
    predicted: Tensor, target: Tensor, classes: int, top5: Tensor | None = None
) -> Classification:
    right = (predicted == target).double()
    n, p = len(right), right.mean().item()
    counts = torch.bincount(target, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.double).index_add(0, target, right)
    return Classification(
        top1=p,
        top5=None if top5 is None else top5.double().mean().item(),
        mean_per_class=(per_class / counts)[counts > 0].mean().item(),
        chance=1 / classes,
        majority=counts.max().item() / n,
        classes=classes,
        images=n,
        stderr=(p * (1 - p) / n) ** 0.5,
    )


class _Texts:
    """What open_clip's classifier asks a model for, through its `forward`."""

    def __init__(self, model: nn.Module, clip: ClipModel) -> None:
        self._model = model
        self._is_coca = isinstance(clip.model, CoCa)
        self._size = _image_size(clip.model)

    def encode_text(self, text: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return text_features(self._model, text, self._is_coca, self._size).float()


def linear_probe(encoded: Encoded, classes: Sequence[str], *, C: float = 0.316) -> Classification:
    """Accuracy of logistic regression on the image features, each image being classified by the
    regression fitted on the other half of the images (two folds with equal shares of the classes;
    classes of one image are left out). `C` is scikit-learn's, by default that of the paper of CLIP.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    check_probe(encoded.labels)
    number = {label: index for index, label in enumerate(classes)}
    target = np.array([number[str(label)] for label in encoded.labels])
    counts = np.bincount(target, minlength=len(classes))
    kept = counts[target] >= 2
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    features = encoded.images.numpy()[kept]
    probe = LogisticRegression(C=C, max_iter=1000)
    predicted = np.full(kept.sum(), -1)
    if np.isfinite(features).all():
        predicted = cross_val_predict(probe, features, target[kept], cv=folds)
    return _classification(
        torch.from_numpy(predicted), torch.from_numpy(target[kept]), len(classes)
    )


def check_probe(labels: Sequence[str | None]) -> None:
    """
    Raises:
        ValueError: too few images of too few classes for `linear_probe`.
    """
    counts = Counter(label for label in labels if label is not None)
    if sum(count >= 2 for count in counts.values()) < 2:
        rule = "a probe needs two classes with two images or more"
        raise refusal("linear_probe", True, rule, "Use more images, or leave it out")


def best_images(encoded: Encoded, query: int, number: int) -> list[int]:
    """The rows of the images that score best for the caption of row `query`."""
    assert encoded.texts is not None
    scores = encoded.images @ encoded.texts[query]
    return scores.topk(min(number, len(scores))).indices.tolist()

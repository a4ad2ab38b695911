"""CLIP models with a loss and logits for a batch, as classifiers have them: for measurements that
take any model. Texts are encoded in each pass, by the weights as they are then."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from nso_hf.curvature.batches import Batch
from nso_hf.refusal import refusal
from nso_hf.running.sampling import places
from nso_hf.tasks.clip.encoding import image_size
from nso_hf.tasks.clip.labelled import Labelled
from nso_hf.tasks.clip.models import ClipModel, is_coca, text_features
from nso_hf.tasks.clip.pairs import Pair, Pairs, Skipped
from nso_hf.tasks.clip.stream import nothing_usable, usable

Outputs = dict[str, Tensor]
Measurable = tuple[nn.Module, list[Batch]]
"""A model, and batches of what its `forward` takes."""

_TEXTS = 512  # encoded at a time


class ZeroShotClassifier(nn.Module):
    """A CLIP model that tells images apart by what prompts make of the names of classes.

        logits = s i @ c,    c = m / |m|,    m = mean_p text(prompt p of the class)

    with the normalised features i of an image and text(p) of prompts, and s = exp(logit_scale); as
    open_clip's `build_zero_shot_classifier`. The loss is the cross-entropy.

    Args:
        names: of the classes.
        prompts: functions or format strings, from a name to a text.
        images_at_once: encoded in a pass of the model.
    """

    def __init__(
        self, clip: ClipModel, names: Iterable[str], prompts: Sequence[Any], images_at_once: int
    ) -> None:
        super().__init__()
        self.model = clip.model
        self._decodes, self._image_size = is_coca(clip.model), image_size(clip.model)
        self._num_prompts, self._images_at_once = len(prompts), images_at_once
        texts = [
            p.format(name) if isinstance(p, str) else p(name) for name in names for p in prompts
        ]
        tokens = clip.tokenizer(texts).to(next(clip.model.parameters()).device)
        self.register_buffer("texts", tokens, persistent=False)

    def forward(self, image: Tensor, labels: Tensor) -> Outputs:
        """For images (n, 3, H, W) and their classes (n,)."""
        chunks = image.split(self._images_at_once)
        images = torch.cat([self.model(image=x)["image_features"].float() for x in chunks])
        logits = _scale(self.model) * images @ self._classes().T  # (n, classes)
        return {"loss": cross_entropy(logits, labels), "logits": logits}

    def _classes(self) -> Tensor:
        chunks = self.get_buffer("texts").split(_TEXTS)
        encoded = [text_features(self.model, t, self._decodes, self._image_size) for t in chunks]
        by_class = torch.cat(encoded).float().unflatten(0, (-1, self._num_prompts))
        return normalize(by_class.mean(dim=1), dim=-1)


class PairMatcher(nn.Module):
    """A CLIP model that finds the caption of each image among those of the batch, and the image of
    each caption.

        logits[n] = s [i_n @ t_1 ... i_n @ t_B; i_1 @ t_n ... i_B @ t_n]

    The right ones are n in both rows, and the loss, the cross-entropy, is the contrastive loss.
    """

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.model = clip.model

    def forward(self, image: Tensor, text: Tensor, labels: Tensor) -> Outputs:
        """For images (B, 3, H, W), texts (B, context length) and the labels (B, 2)."""
        outputs = self.model(image=image, text=text)
        images, texts = (outputs[f"{each}_features"].float() for each in ("image", "text"))
        similarities = _scale(self.model) * images @ texts.T
        logits = torch.stack([similarities, similarities.T], dim=1)  # (B, 2, B)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _scale(model: nn.Module) -> Tensor:
    """That of the logits. A bias of theirs, SigLIP's, changes no softmax."""
    logit_scale: Any = model.logit_scale
    scale: Tensor = logit_scale.float().exp()
    return scale


def zero_shot_classification(
    clip: ClipModel, labelled: Labelled, prompts: Sequence[Any], *, number: int, size: int
) -> Measurable:
    """A classifier, and `number` images drawn at random in one batch, so that it encodes the
    classes once for all; it encodes `size` images at a time."""
    number_of = {label: index for index, label in enumerate(labelled.names)}
    chosen = set(places(number, len(labelled.pairs.labels())))
    pairs, images = zip(*_usable(clip, labelled.pairs, "label", number, chosen), strict=True)
    labels = torch.tensor([number_of[str(pair.label)] for pair in pairs])
    classifier = ZeroShotClassifier(clip, labelled.names.values(), prompts, size)
    return classifier, [{"image": torch.stack(images), "labels": labels}]


def matching(clip: ClipModel, pairs: Pairs, *, number: int, size: int) -> Measurable:
    """The model, and the first `number` pairs in batches of `size`. A last pair that would be alone
    is left out.

    Raises:
        ValueError: there is nothing to tell apart.
    """
    found = list(_usable(clip, pairs, "caption", number))
    chunks = [found[start : start + size] for start in range(0, len(found), size)]
    batches: list[Batch] = [_batch(clip, chunk) for chunk in chunks if len(chunk) > 1]
    if not batches:
        rule = f"of {len(found)} pairs in batches of {size} none has another beside it"
        raise refusal("data", pairs.name, rule, "Use two pairs or more in a batch")
    return PairMatcher(clip), batches


def _batch(clip: ClipModel, chunk: list[tuple[Pair, Tensor]]) -> Batch:
    pairs, images = zip(*chunk, strict=True)
    texts = clip.tokenizer([str(pair.caption) for pair in pairs])
    labels = torch.arange(len(pairs))[:, None].expand(-1, 2)
    return {"image": torch.stack(images), "text": texts, "labels": labels}


def _usable(
    clip: ClipModel, pairs: Pairs, needs: str, number: int, chosen: set[int] | None = None
) -> Iterator[tuple[Pair, Tensor]]:
    """The first `number` pairs that can be used, of those at the positions `chosen`, with their
    images as the model takes them."""
    again = copy(pairs)
    again.skipped = Skipped()  # whoever reads all of it counts
    left = number
    for position, pair in enumerate(again):
        if chosen is not None and position not in chosen:
            continue
        image = usable(pair, again, needs)
        if image is not None:
            yield pair, clip.eval_transform(image)
            left -= 1
        if not left:
            return
    if left == number:
        raise nothing_usable(again)

"""Classification of encoded images: by the names of the classes, and by a linear probe."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nso_hf.refusal import needs, refusal
from nso_hf.tasks.clip.encoding import Encoded, evaluating, image_size
from nso_hf.tasks.clip.models import ClipModel, is_coca, text_features
from nso_hf.tasks.images.classification import Classification, classification

needs("nso_hf.tasks.clip", "clip", "open_clip", "sklearn")

from open_clip import (  # noqa: E402
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    build_zero_shot_classifier,
)

TEMPLATES = {
    "openai": OPENAI_IMAGENET_TEMPLATES,
    "simple": SIMPLE_IMAGENET_TEMPLATES,
    "name": ("{}",),
}
"""Functions or format strings that make a prompt of a class's name."""
IMAGENET_NAMES: dict[str, str] = {str(i): name for i, name in enumerate(IMAGENET_CLASSNAMES)}
"""Class, by its number in order of the WordNet ids, to the name that open_clip has for it."""

_CHUNK = 1024  # images compared with all classes at a time


def class_names(
    labels: Sequence[str | None], name: str, candidates: Collection[str] = ()
) -> list[str]:
    """The classes that occur, sorted.

    Raises:
        ValueError: none occurs, or one that has no other class beside it among the `candidates`.
    """
    classes = sorted({label for label in labels if label is not None})
    if not classes or len({*classes, *candidates}) < 2:
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
    with evaluating(model):
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
    return classification(ranked[:, 0], target, classes, top5), ranked[:, 0]


class _Texts:
    """What open_clip's classifier asks a model for, through its `forward`."""

    def __init__(self, model: nn.Module, clip: ClipModel) -> None:
        self._model = model
        self._is_coca = is_coca(clip.model)
        self._size = image_size(clip.model)

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
    return classification(torch.from_numpy(predicted), torch.from_numpy(target[kept]), classes)


def check_probe(labels: Sequence[str | None]) -> None:
    """
    Raises:
        ValueError: too few images of too few classes for `linear_probe`.
    """
    counts = Counter(label for label in labels if label is not None)
    if sum(count >= 2 for count in counts.values()) < 2:
        rule = "a probe needs two classes with two images or more"
        raise refusal("linear_probe", True, rule, "Use more images, or leave it out")

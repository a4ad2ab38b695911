"""The options of training classifiers of images beside those of training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nso_hf.refusal import refusal
from nso_hf.tasks.images.options import ColumnOptions, check_image_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nso_hf.tasks.images.dataset import Pixels

AUGMENTATIONS = ("none", "flip", "crop", "resized_crop", "trivial", "randaugment")
_SIZES = {"digits": 8, "fashion_mnist": 28}
_SIZE = 64  # of other images, for new models


@dataclass
class ClassifierOptions:
    _argument_group_name = "model"

    model_name_or_path: str = field(
        default="vit",
        metadata={
            "help": "vit or cnn: small new ones; a folder or an id of the hub that "
            "AutoModelForImageClassification loads; timm/ and the name of a model of timm."
        },
    )
    pretrained: bool = field(
        default=True,
        metadata={"help": "Begin with its weights, if it has any. False: with random ones."},
    )
    model_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of its configuration, as JSON."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels; images are resized to it. Default: the model's own; of new ones 8 "
            "for the digits, 28 for Fashion-MNIST, else 64."
        },
    )
    linear_probe: bool = field(
        default=False,
        metadata={"help": "Train the last layer alone, on features that do not change."},
    )

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_image_size(self.image_size)
        if isinstance(self.model_kwargs, str):
            cure = """Write it as '{"hidden_size": 128}'"""
            try:
                given = json.loads(self.model_kwargs)
            except json.JSONDecodeError as error:
                rule = f"not JSON ({error})"
                raise refusal("model_kwargs", self.model_kwargs, rule, cure) from error
            if not isinstance(given, dict):
                raise refusal("model_kwargs", self.model_kwargs, "no JSON object", cure)
            self.model_kwargs = given
        for name in {"num_labels", "id2label", "label2id"} & {*(self.model_kwargs or {})}:
            raise refusal(
                "model_kwargs", name, "the data say which classes there are", "Leave it out"
            )

    def pixels(self, data: str) -> "Pixels":
        """How images are made for the model, where they are those of `data`."""
        from nso_hf.tasks.images.classifiers import pixels_for

        return pixels_for(
            self.model_name_or_path,
            self.image_size,
            default_size=_SIZES.get(data, _SIZE),
            pretrained=self.pretrained,
        )

    def load(self, classes: Sequence[str], pixels: "Pixels") -> "PreTrainedModel":
        """The model, its head alone trainable with `linear_probe`."""
        from nso_hf.tasks.images.classifiers import load_classifier, train_head_alone

        assert not isinstance(self.model_kwargs, str)
        model = load_classifier(
            self.model_name_or_path,
            classes,
            pixels,
            pretrained=self.pretrained,
            model_kwargs=self.model_kwargs or {},
        )
        if self.linear_probe:
            train_head_alone(model, len(classes))
        return model


@dataclass(kw_only=True)
class ClassifiedDataOptions(ColumnOptions):
    _argument_group_name = "data"

    data: str = field(
        default="digits",
        metadata={
            "help": "Images with classes: digits (of scikit-learn), fashion_mnist, openmoji "
            "(carried by pip), a folder with a folder for each class, a .parquet file, a hub id."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split trained on."})
    test_split: str | None = field(
        default="test",
        metadata={"help": "Split tested on; none: --test_size of the former are held out."},
    )
    augmentation: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "How training images are changed, anew in each pass: one or more, in order "
            "(crop: after padding by an eighth).",
            "choices": AUGMENTATIONS,
        },
    )

    def __post_init__(self) -> None:
        self._check_paths("data")
        self._check_columns(self.data)
        if self.test_split is not None and self.test_split.lower() == "none":
            self.test_split = None
        if self.test_split == self.train_split:
            cure = "Name another, or none to hold --test_size of it out"
            raise refusal("test_split", self.test_split, "is what is trained on", cure)
        for name in self.augmentation:
            if name not in AUGMENTATIONS:
                cure = f"Choose some of {', '.join(AUGMENTATIONS)}"
                raise refusal("augmentation", name, "unknown", cure)
        is_mixed = "none" in self.augmentation and len(self.augmentation) > 1
        if is_mixed or len(set(self.augmentation)) < len(self.augmentation):
            given = " ".join(self.augmentation)
            raise refusal("augmentation", given, "it contradicts itself", "Name each once")

"""The options of CLIP pretraining beside those of training. None of the packages of the extra is
needed to read them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nso_hf.refusal import refusal

if TYPE_CHECKING:
    from nso_hf.tasks.clip.models import ClipModel
    from nso_hf.tasks.clip.pairs import Pairs

_TEMPLATES = ("openai", "simple", "name")


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str = field(
        metadata={
            "help": "Name of an open_clip model (ViT-S-16), the path of a JSON file that describes "
            "one, local-dir:FOLDER or hf-hub:ID."
        }
    )
    pretrained: str | None = field(
        default=None,
        metadata={"help": "open_clip's tag of weights, or a file. Default: random weights."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels, other than the model's own."}
    )
    siglip: bool = field(
        default=False, metadata={"help": "Sigmoid loss (SigLIP) with a bias of the logits."}
    )
    patch_dropout: float | None = field(
        default=None, metadata={"help": "Share of image patches left out in training, in [0, 1)."}
    )
    lock_image: bool = field(default=False, metadata={"help": "Freeze the image tower."})
    lock_image_unlocked_groups: int = field(
        default=0, metadata={"help": "But for its last so many groups of layers."}
    )
    lock_image_freeze_bn_stats: bool = field(
        default=False, metadata={"help": "Freeze its batch-norm statistics too."}
    )
    lock_text: bool = field(default=False, metadata={"help": "Freeze the text tower."})
    lock_text_unlocked_layers: int = field(
        default=0, metadata={"help": "But for its last so many layers."}
    )

    def __post_init__(self) -> None:
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise refusal("patch_dropout", self.patch_dropout, "must be in [0, 1)", "Typical: 0.5")
        for option in ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"):
            if getattr(self, option) and not self.lock_image:
                value = getattr(self, option)
                raise refusal(option, value, "has no effect", "Set --lock_image true too")
        if self.lock_text_unlocked_layers and not self.lock_text:
            value = self.lock_text_unlocked_layers
            cure = "Set --lock_text true too"
            raise refusal("lock_text_unlocked_layers", value, "has no effect", cure)

    @property
    def is_pretrained(self) -> bool:
        """Whether training begins with weights that are not random."""
        return self.pretrained is not None or ":" in self.model

    def load(self, augmentation: dict[str, Any] | None) -> "ClipModel":
        """The model, its towers locked as asked."""
        from nso_hf.tasks.clip.models import load_clip, lock

        clip = load_clip(
            self.model,
            self.pretrained,
            image_size=self.image_size,
            patch_dropout=self.patch_dropout,
            siglip=self.siglip,
            augmentation=augmentation,
        )
        lock(
            clip.model,
            image=self.lock_image,
            unlocked_groups=self.lock_image_unlocked_groups,
            freeze_bn_stats=self.lock_image_freeze_bn_stats,
            text=self.lock_text,
            unlocked_layers=self.lock_text_unlocked_layers,
        )
        return clip


@dataclass
class DataOptions:
    _argument_group_name = "data"
    _may_change = ("zero_shot_data", "zero_shot_split", "label_column")  # when a run goes on

    train_data: str = field(
        metadata={
            "help": "webdataset shards ('cc3m-{000..331}.tar', several joined by ::), a folder of "
            "them, a .csv, .tsv, .json, .jsonl or .parquet file, a folder of images, a hub id; or "
            "openmoji (carried by pip)."
        }
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out pairs for validation loss and retrieval."}
    )
    zero_shot_data: str | None = field(
        default=None, metadata={"help": "Images with classes, for zero-shot classification."}
    )
    train_num_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs in the training shards. Default: sizes.json or __len__ beside them, or "
            "counted."
        },
    )
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, or suffix of the shards' files. Default: filepath in CSV files, image "
            "elsewhere; png, jpg, jpeg or webp in shards."
        },
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, suffix, or entry of the shards' json files. Default: title in CSV "
            "files, text elsewhere; txt in shards."
        },
    )
    label_column: str = field(
        default="label", metadata={"help": "The same, of the class in --zero_shot_data."}
    )
    csv_separator: str = field(default="\t", metadata={"help": "Between the columns of a .csv."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a hub dataset."})
    zero_shot_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    augmentation: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": """Fields of open_clip.AugmentationCfg, as '{"scale": [0.5, 1.0]}'."""},
    )

    def __post_init__(self) -> None:
        if isinstance(self.augmentation, str):
            try:
                self.augmentation = json.loads(self.augmentation)
            except json.JSONDecodeError as error:
                cure = """Write it as '{"scale": [0.5, 1.0]}'"""
                rule = f"not JSON ({error})"
                raise refusal("augmentation", self.augmentation, rule, cure) from error
        if not isinstance(self.augmentation, (dict, type(None))):
            cure = """Write it as '{"scale": [0.5, 1.0]}'"""
            raise refusal("augmentation", self.augmentation, "not a mapping", cure)
        if self.train_num_pairs is not None and self.train_num_pairs < 1:
            value = self.train_num_pairs
            raise refusal("train_num_pairs", value, "must be at least 1", "Leave it out to count")

    def open(self, data: str, split: str, num_pairs: int | None = None, *, labels: bool) -> "Pairs":
        """The pairs that one of the options names; with `labels`, those with a class."""
        from nso_hf.tasks.clip.openmoji import openmoji_pairs
        from nso_hf.tasks.clip.pairs import Fields
        from nso_hf.tasks.clip.sources import open_pairs

        if data == "openmoji":
            for option in ("image_column", "caption_column", "train_num_pairs"):
                if getattr(self, option) is not None:
                    value = getattr(self, option)
                    raise refusal(option, value, "openmoji has no columns", "Leave it out")
            return openmoji_pairs("train" if split == self.train_split else "test", labelled=labels)
        label = self.label_column if labels else None
        return open_pairs(
            data,
            Fields(self.image_column, self.caption_column, label),
            split=split,
            csv_separator=self.csv_separator,
            num_pairs=num_pairs,
        )


@dataclass
class EvaluationOptions:
    _argument_group_name = "evaluation"
    _may_change = (  # when a run goes on: all is measured after training
        "test",
        "templates",
        "class_names",
        "linear_probe",
        "curvature",
        "curvature_batches",
        "curvature_samples",
    )

    test: bool = field(
        default=True,
        metadata={
            "help": "Classify the images with classes, whatever option names them; false leaves "
            "them unseen, as for choosing options on validation."
        },
    )
    templates: str = field(
        default="openai",
        metadata={
            "help": f"Prompts of a class: {', '.join(_TEMPLATES)} (open_clip's 80 and 7; the name "
            "alone), or a text file with one prompt a line, {} standing for the name."
        },
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of all classes to choose from: class -> name in prompts, a list of "
            "names, or ImageNet's index; or imagenet, for classes numbered 0 to 999. Default: the "
            "classes of the data themselves."
        },
    )
    linear_probe: bool = field(
        default=False,
        metadata={"help": "Fit logistic regression on the image features of --zero_shot_data."},
    )
    curvature: bool = field(
        default=False,
        metadata={
            "help": "Measure the trace and the largest eigenvalue of the Hessian of the training "
            "loss after training, by all trained weights and by those of each tower."
        },
    )
    curvature_batches: int = field(
        default=2,
        metadata={"help": "Training batches it is measured on, without augmentation."},
    )
    curvature_samples: int = field(
        default=20, metadata={"help": "Products with the Hessian for each trace."}
    )

    def __post_init__(self) -> None:
        if self.templates not in _TEMPLATES:
            if not Path(self.templates).is_file():
                cure = f"Use {', '.join(_TEMPLATES)}, or the path of a text file"
                raise refusal("templates", self.templates, "unknown, and no such file", cure)
            self._check_templates()
        if self.class_names not in (None, "imagenet") and not Path(str(self.class_names)).is_file():
            cure = "Give a JSON file, or imagenet"
            raise refusal("class_names", self.class_names, "no such file", cure)
        for option in ("curvature_batches", "curvature_samples"):
            if getattr(self, option) < 1:
                value = getattr(self, option)
                raise refusal(option, value, "must be at least 1", "Give a positive number")

    def _check_templates(self) -> None:
        cure = "Write 'a photo of {}'"
        if not self.prompts:
            raise refusal("templates", self.templates, "the file is empty", cure)
        for prompt in self.prompts:
            if not _takes_a_name(prompt):
                rule = f"the line {prompt!r} does not have one {{}} for the name"
                raise refusal("templates", self.templates, rule, cure)

    @property
    def prompts(self) -> tuple[Any, ...]:
        """Functions or format strings, from a class's name to a prompt."""
        if self.templates in _TEMPLATES:
            from nso_hf.tasks.clip.classification import TEMPLATES

            return tuple(TEMPLATES[self.templates])
        lines = Path(self.templates).read_text(encoding="utf-8-sig").splitlines()
        return tuple(line.strip() for line in lines if line.strip())

    def names(self, classes: Iterable[str]) -> dict[str, str]:
        """All classes to choose from, with what the prompts call them: those of --class_names, or
        these.

        Raises:
            ValueError: one of these has no name.
        """
        if self.class_names is None:
            return {label: label for label in sorted(set(classes))}
        from nso_hf.tasks.clip.names import named_classes

        return named_classes(self.class_names, classes)


def _takes_a_name(prompt: str) -> bool:
    try:
        return prompt.format("name") != prompt
    except (KeyError, IndexError, ValueError):
        return False

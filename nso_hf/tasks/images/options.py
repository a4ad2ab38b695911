"""The options of pretraining masked autoencoders beside those of training."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nso_hf.refusal import Refusal, check_choice, check_integer, check_positive, refusal
from nso_hf.tasks.images.named import NAMED

if TYPE_CHECKING:
    from nso_hf.tasks.images.dataset import Images, Pixels
    from nso_hf.tasks.images.models import ViTMAEForPreTraining

_LARGEST = 4096  # pixels of an image's side
_OF_NEW_MODELS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
)


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Weights to begin with: a folder or an id of the hub (facebook/vit-mae-base). "
            "Default: random weights, of the sizes below."
        },
    )
    image_size: int = field(default=32, metadata={"help": "Pixels; images are resized to it."})
    patch_size: int = field(default=4, metadata={"help": "Pixels of a patch's side."})
    num_channels: int = field(default=3, metadata={"help": "3, or 1: grey images."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the encoder."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_attention_heads: int = field(default=3, metadata={"help": "Heads of the encoder."})
    decoder_hidden_size: int = field(default=96, metadata={"help": "Width of the decoder."})
    decoder_num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the decoder."})
    decoder_num_attention_heads: int = field(default=3, metadata={"help": "Heads of the decoder."})
    mask_ratio: float = field(default=0.75, metadata={"help": "Share of the patches not seen."})
    norm_pix_loss: bool = field(
        default=False,
        metadata={"help": "Reconstruct the pixels of each patch less their mean, by their spread."},
    )

    def __post_init__(self) -> None:
        for name in _OF_NEW_MODELS:
            check_integer(name, getattr(self, name), 1, "Give a positive number")
        check_image_size(self.image_size)
        if self.num_channels not in (1, 3):
            raise refusal("num_channels", self.num_channels, "must be 1 or 3", "Use 1 for grey")
        if self.model_name_or_path is not None:
            for name in _OF_NEW_MODELS:
                value = getattr(self, name)
                if value != getattr(ModelOptions, name):
                    raise refusal(name, value, "the model has its own", "Leave it out")
        else:
            self._check_sizes()
        check_masking(self.mask_ratio, (self.image_size // self.patch_size) ** 2)

    def _check_sizes(self) -> None:
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            rule = f"not a multiple of the patches of {self.patch_size} pixels"
            raise refusal("image_size", self.image_size, rule, f"Use {near}, or another multiple")
        for tower in ("", "decoder_"):
            name, heads = f"{tower}hidden_size", getattr(self, f"{tower}num_attention_heads")
            width = getattr(self, name)
            if width % 4 or width % heads:
                rule = f"must be a multiple of 4 (for positions) and of the {heads} heads"
                raise refusal(name, width, rule, "Use such a multiple")

    def load(self) -> "tuple[ViTMAEForPreTraining, Pixels]":
        """The model, and how images are made for it."""
        from transformers import AutoConfig, ViTMAEConfig

        from nso_hf.tasks.images.dataset import Pixels
        from nso_hf.tasks.images.models import load_autoencoder, new_autoencoder

        masking: dict[str, Any] = {
            "mask_ratio": self.mask_ratio,
            "norm_pix_loss": self.norm_pix_loss,
        }
        if self.model_name_or_path is None:
            sizes: dict[str, Any] = {name: getattr(self, name) for name in _OF_NEW_MODELS}
            sizes["intermediate_size"] = 4 * self.hidden_size
            sizes["decoder_intermediate_size"] = 4 * self.decoder_hidden_size
            model = new_autoencoder(ViTMAEConfig(**sizes, **masking))
            half = (0.5,) * self.num_channels
            return model, Pixels(self.image_size, self.num_channels, half, half)
        name = self.model_name_or_path
        cure = "Give a folder that save_pretrained of ViTMAEForPreTraining wrote, or its id"
        try:
            config: Any = AutoConfig.from_pretrained(name)
            if config.model_type == "vit_mae":
                model = load_autoencoder(name, **masking)
                mean, std = _normalisation(name, config.num_channels)
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise refusal("model_name_or_path", name, reason, cure) from error
        if config.model_type != "vit_mae":
            rule = f"its type is {config.model_type!r}, not 'vit_mae'"
            raise refusal("model_name_or_path", name, rule, cure)
        check_masking(self.mask_ratio, (config.image_size // config.patch_size) ** 2)
        return model, Pixels(config.image_size, config.num_channels, mean, std)


def check_image_size(size: int) -> None:
    """
    Raises:
        ValueError: images are not of so many pixels.
    """
    check_integer("image_size", size, 1, "Give a number of pixels")
    if size > _LARGEST:
        rule = f"must be at most {_LARGEST}, where a batch of 32 takes 6 GB"
        raise refusal("image_size", size, rule, "Usual sizes are 32 to 1024")


def check_masking(ratio: float, patches: int) -> None:
    """
    Raises:
        ValueError: all patches or none of so many would be masked.
    """
    check_positive("mask_ratio", ratio, "Typical: 0.75")
    seen = int(patches * (1 - ratio))
    if not 1 <= seen < patches:
        rule = f"of {patches} patches {max(0, seen)} would be seen"
        raise refusal("mask_ratio", ratio, rule, "Use 0.75, or smaller patches")


def _normalisation(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the values of a model's images, as its files say."""
    from transformers.image_processing_base import ImageProcessingMixin

    options: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name)[0]
    half = [0.5] * channels
    return tuple(options.get("image_mean", half)), tuple(options.get("image_std", half))


@dataclass(kw_only=True)
class ColumnOptions:
    """Where images and classes are in a collection that is opened."""

    image_column: str = field(default="image", metadata={"help": "Of a data set that has columns."})
    label_column: str = field(
        default="label", metadata={"help": "The class, where a data set has columns."}
    )
    fashion_mnist_folder: str = field(
        default="/usr/share/datasets/fashion-mnist",
        metadata={"help": "Where Debian's package dataset-fashion-mnist has its files."},
    )

    def open(
        self, option: str, pixels: "Pixels", *, split: str = "train_split", labelled: bool
    ) -> "Images":
        """The images that `option` names, of the split that the option `split` names."""
        from nso_hf.tasks.images.sources import open_images

        try:
            return open_images(
                getattr(self, option),
                getattr(self, split),
                pixels,
                image_column=self.image_column,
                label_column=self.label_column if labelled else None,
                fashion_mnist_folder=self.fashion_mnist_folder,
            )
        except Refusal as error:  # as the options are called here
            text = re.sub(r"^data=", f"{option}=", str(error))
            raise Refusal(re.sub(r"^split=", f"{split}=", text)) from error

    def _check_columns(self, *sources: str | None) -> None:
        """Refuse what is said of columns and files that none of the `sources` has."""
        has_columns = any(source not in (*NAMED, None) for source in sources)
        read = {
            "image_column": has_columns,
            "label_column": has_columns,
            "fashion_mnist_folder": "fashion_mnist" in sources,
        }
        for option in fields(ColumnOptions):
            value = getattr(self, option.name)
            if value != option.default and not read[option.name]:
                named = dict.fromkeys(filter(None, sources))
                rule = f"has no effect on {' and '.join(named)}"
                raise refusal(option.name, value, rule, "Leave it out")

    def _check_paths(self, *options: str) -> None:
        for option in options:
            value = getattr(self, option)
            if value == "":
                raise refusal(option, value, "names no data", "Give a path or a hub id")
            if value is not None and value.startswith((".", "/")) and not Path(value).exists():
                raise refusal(option, value, "no such file or folder", "Check the path")


@dataclass(kw_only=True)
class DataOptions(ColumnOptions):
    _argument_group_name = "data"

    train_data: str = field(
        metadata={
            "help": "Images to pretrain on: digits (of scikit-learn), fashion_mnist, openmoji "
            "(carried by pip), a folder of images, a .parquet file, a hub id."
        }
    )
    target_data: str | None = field(
        default=None,
        metadata={
            "help": "The task to come: images with classes (a folder for each). Its training "
            "images are unlabelled in pretraining, its test images unseen."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split trained on, of both."})
    test_split: str = field(default="test", metadata={"help": "Split of --target_data tested on."})
    validation_size: int = field(
        default=0, metadata={"help": "Training images held out, for --eval_strategy."}
    )

    def __post_init__(self) -> None:
        check_integer("validation_size", self.validation_size, 0, "0 holds none out")
        self._check_paths("train_data", "target_data")
        self._check_columns(self.train_data, self.target_data)


@dataclass
class EvaluationOptions:
    _argument_group_name = "evaluation"
    _may_change = (  # when a run goes on: all is measured after training
        "evaluation",
        "test",
        "examples_per_class",
        "fine_tune_epochs",
        "fine_tune_learning_rate",
    )

    evaluation: str = field(
        default="linear_probe",
        metadata={
            "help": "linear_probe: logistic regression on the frozen representations; fine_tune: "
            "all weights, with the options of training; or none.",
            "choices": ["linear_probe", "fine_tune", "none"],
        },
    )
    test: bool = field(
        default=True,
        metadata={
            "help": "Judge it on the test images; false leaves them unseen, as for choosing "
            "options on validation."
        },
    )
    examples_per_class: int | None = field(
        default=None,
        metadata={"help": "Labelled training images of each class. Default: all there are."},
    )
    fine_tune_epochs: float = field(default=20.0, metadata={"help": "Passes over them."})
    fine_tune_learning_rate: float = field(
        default=5e-4, metadata={"help": "Highest learning rate of fine-tuning."}
    )

    @property
    def judges(self) -> bool:
        """Whether test images are asked for."""
        return self.test and self.evaluation != "none"

    def __post_init__(self) -> None:
        check_choice("evaluation", self.evaluation, ["linear_probe", "fine_tune", "none"])
        if self.examples_per_class is not None:
            check_integer("examples_per_class", self.examples_per_class, 1, "Typical: 1 to 100")
        check_positive("fine_tune_epochs", self.fine_tune_epochs, "Typical: 20 to 100")
        check_positive("fine_tune_learning_rate", self.fine_tune_learning_rate, "Typical: 5e-4")

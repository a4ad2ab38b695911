"""Classifiers of images: those of transformers and of timm, and small new ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    ViTConfig,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from nso_hf.backends import shape_of
from nso_hf.refusal import Refusal, refusal
from nso_hf.tasks.images.dataset import Pixels

_TIMM = "timm/"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
_CURE = "Give a folder or an id of a model that AutoModelForImageClassification loads, or " + (
    "vit, cnn, or timm/ and the name of a model of timm"
)


def new_vit(image_size: int) -> Any:
    """The configuration of a vision transformer of 16 patches, 0.2M parameters."""
    if image_size % 4:
        near = max(4, 4 * round(image_size / 4))
        rule = "not a multiple of 4, the patches in a row"
        raise refusal("image_size", image_size, rule, f"Use {near}, or another multiple")
    return ViTConfig(
        image_size=image_size,
        patch_size=image_size // 4,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,  # transformers' is for ten times the width: it would begin slowly
    )


def new_cnn(image_size: int) -> Any:
    """The configuration of a residual network with BatchNorm, 0.1M parameters."""
    return RegNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], groups_width=32
    )


NEW: Mapping[str, Callable[[int], Any]] = {"vit": new_vit, "cnn": new_cnn}
"""Name -> the configuration for images of a size."""


def pixels_for(name: str, image_size: int | None, *, default_size: int, pretrained: bool) -> Pixels:
    """How images are made for a model, by its image processor where it has one.

    Args:
        image_size: other than the model's own.
        default_size: of new models.

    Raises:
        ValueError: there is no such model, or it does not take this size.
    """
    if name in NEW:
        half = (0.5,) * 3
        return Pixels(image_size or default_size, 3, half, half)
    is_new = name.startswith(_TIMM) and not pretrained
    own = _timm_options(name) if is_new else _own_options(name)
    size = int(image_size or own["image_size"])
    channels = own["num_channels"]
    mean, std = (tuple(own[key])[:channels] for key in ("image_mean", "image_std"))
    if own.get("fixed_input_size") and size != own["image_size"]:
        rule = f"{name} takes images of {own['image_size']} pixels"
        raise refusal("image_size", size, rule, "Leave it out")
    return Pixels(size, channels, mean, std)


def load_classifier(
    name: str,
    classes: Sequence[str],
    pixels: Pixels,
    *,
    pretrained: bool,
    model_kwargs: Mapping[str, Any],
) -> PreTrainedModel:
    """The model in float32, with a new head where it has one of another number of classes.

    Args:
        model_kwargs: of its configuration.

    Raises:
        ValueError: it cannot be loaded, or its weights are of another size than asked for.
    """
    names: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: index for index, label in enumerate(classes)},
    }
    changes = names | dict(model_kwargs)
    try:
        if name in NEW:
            return _new(NEW[name](pixels.image_size), changes)
        if not pretrained:
            config = _timm_config(name) if name.startswith(_TIMM) else _config(name)
            return _with_pixels(_new(_sized(config, pixels), changes), pixels)
        config = _config(name)
        if hasattr(config, "image_size"):
            changes = {"image_size": pixels.image_size} | changes
        if config.model_type == "timm_wrapper":  # it looks at nothing else
            changes["num_labels"] = len(classes)
        with _quiet():  # of the head, which is expected; the rest is refused below
            model, found = AutoModelForImageClassification.from_pretrained(
                name,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **changes,
            )
    except Refusal:
        raise
    except Exception as error:  # of a configuration, of files, of timm: of many kinds
        raise _unreadable(name, error) from error
    _check_loaded(name, model, found, len(classes), pixels.image_size)
    loaded: PreTrainedModel = model
    return _with_pixels(loaded, pixels)


def _check_loaded(
    name: str, model: Any, found: Mapping[str, Any], classes: int, image_size: int
) -> None:
    """That nothing begins with random weights but a layer for the classes."""
    every = {key: tuple(shape_of(parameter)) for key, parameter in model.named_parameters()}
    shapes = {key: shape for key, shape in every.items() if shape[:1] != (classes,)}
    # Before transformers 5 they come without their shapes.
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    for key in sorted(shapes.keys() & set(mismatched)):
        rule = f"the {key} of {name} is of another shape than {shapes[key]}"
        raise refusal("image_size", image_size, rule, "Leave --image_size and --model_kwargs out")
    for key in sorted(shapes.keys() & set(found["missing_keys"])):
        rule = f"it has no {key}, which would be random"
        raise refusal("model_name_or_path", name, rule, _CURE)


def train_head_alone(model: nn.Module, classes: int) -> None:
    """Freeze all but the last layer, and have what is frozen in evaluation mode in each pass: no
    dropout, and the statistics of BatchNorm as they are.

    Raises:
        ValueError: there is no such layer.
    """
    head = head_of(model, classes)
    if head is None:
        rule = f"{type(model).__name__} has no linear layer for its {classes} classes"
        raise refusal("linear_probe", True, rule, "Leave it out")
    model.requires_grad_(False)
    head.requires_grad_(True)
    own = set(head.modules())
    frozen = [m for m in model.modules() if m not in own and not own & set(m.modules())]
    model.register_forward_pre_hook(partial(_frozen_in_evaluation_mode, frozen))


def head_of(model: nn.Module, classes: int) -> nn.Linear | None:
    """The last linear layer that has an output for each class."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == classes), None)


def _frozen_in_evaluation_mode(frozen: list[nn.Module], model: nn.Module, inputs: Any) -> None:
    for module in frozen:
        module.training = False


def _new(config: Any, changes: Mapping[str, Any]) -> PreTrainedModel:
    for key, value in changes.items():
        if not hasattr(config, key):
            cure = f"Name an option of {type(config).__name__}"
            raise refusal("model_kwargs", key, "the model has no such option", cure)
        setattr(config, key, value)
    model: PreTrainedModel = AutoModelForImageClassification.from_config(
        config, dtype=torch.float32
    )
    return model


def _with_pixels(model: PreTrainedModel, pixels: Pixels) -> PreTrainedModel:
    """Have the configuration of a model of timm say how its images are made, since nothing else is
    read for these."""
    own = getattr(model.config, "pretrained_cfg", None)
    if own is not None:
        size = pixels.image_size
        own |= {"input_size": [pixels.num_channels, size, size], "crop_pct": 1.0}
        own |= {"mean": list(pixels.mean), "std": list(pixels.std)}
        own |= {"interpolation": "bicubic", "crop_mode": "center"}
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _sized(config: Any, pixels: Pixels) -> Any:
    if hasattr(config, "image_size"):
        config.image_size = pixels.image_size
    return config


def _config(name: str) -> Any:
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(name, error) from error
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        rule = f"models of type {config.model_type!r} classify no images"
        raise refusal("model_name_or_path", name, rule, _CURE)
    return config


def _own_options(name: str) -> dict[str, Any]:
    """What a model's files say of its images, or else what is usual."""
    config = _config(name)
    if config.model_type == "timm_wrapper":
        _check_timm(name)
    own: dict[str, Any] = {"image_size": getattr(config, "image_size", 224)}
    own |= dict(zip(("image_mean", "image_std"), _IMAGENET, strict=True))
    own |= _of_timm(getattr(config, "pretrained_cfg", None) or {})
    try:
        written: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:  # the model has none
        written = {}
    size = written.get("crop_size", written.get("size"))
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    if size is not None:
        own["image_size"] = size
    for key in ("image_mean", "image_std"):
        if written.get(key) is not None:
            own[key] = written[key]
    return own | {"num_channels": getattr(config, "num_channels", 3)}


def _timm_options(name: str) -> dict[str, Any]:
    return _of_timm(_timm_cfg(name)) | {"num_channels": 3}


def _timm_cfg(name: str) -> dict[str, Any]:
    """What timm says of an architecture, or one with the name of its weights."""
    _check_timm(name)
    import timm

    architecture = name.removeprefix(_TIMM)
    found: Any = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if found is None:
        raise refusal("model_name_or_path", name, "timm has no such model", _CURE)
    options: dict[str, Any] = found.to_dict()
    return options


def _of_timm(options: Mapping[str, Any]) -> dict[str, Any]:
    names = {"mean": "image_mean", "std": "image_std", "fixed_input_size": "fixed_input_size"}
    found = {ours: options[theirs] for theirs, ours in names.items() if theirs in options}
    return found | ({"image_size": options["input_size"][-1]} if "input_size" in options else {})


def _timm_config(name: str) -> Any:
    from transformers import TimmWrapperConfig

    config: Any = TimmWrapperConfig(architecture=name.removeprefix(_TIMM))
    config.pretrained_cfg = _timm_cfg(name)
    return config


def _check_timm(name: str) -> None:
    if find_spec("timm") is None:
        cure = "Run pip install 'nso_hf[images]'"
        raise refusal("model_name_or_path", name, "timm is not installed", cure)


def _unreadable(name: str, error: Exception) -> Exception:
    reason = " ".join(str(error).split())[:300].rstrip(".:") or type(error).__name__
    return refusal("model_name_or_path", name, reason, _CURE)

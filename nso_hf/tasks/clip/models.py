"""Models of open_clip with what goes with them: tokenizer and image transforms."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from nso_hf.refusal import needs, refusal
from nso_hf.tasks.clip.checkpoint import CONFIG_NAME
from nso_hf.tasks.clip.stream import Tokenizer, Transform

needs("nso_hf.tasks.clip", "clip", "open_clip")

import open_clip  # noqa: E402
from open_clip.factory import get_model_config, parse_model_name  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

logger = hf_logging.get_logger(__name__)

_BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block", "Bottleneck")
"""Modules that are sharded and gathered as one."""


@dataclass(frozen=True)
class ClipModel:
    """A model and what is made to measure for it."""

    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Transform
    eval_transform: Transform
    config: dict[str, Any]
    """Its architecture, as open_clip's JSON files describe it."""

    def check_tokens(self) -> None:
        """
        Raises:
            ValueError: the tokenizer has more tokens than the text model, or no room for a text.
        """
        if torch.equal(*self.tokenizer(["cat", "dog"])):
            context = self.config["text_cfg"].get("context_length")
            rule = "different texts have the same tokens: it has room for their start and end alone"
            raise refusal("context_length", context, rule, "Set it to 8 or more in the model")
        highest = int(self.tokenizer(["a"]).max())
        size = self.config["text_cfg"].get("vocab_size")
        if size is not None and highest >= size:
            rule = f"the tokenizer's tokens go up to {highest}"
            raise refusal("vocab_size", size, rule, f"Set it to {highest + 1} or more in the model")

    def write_config(self, folder: Path) -> None:
        """With the weights in `folder`, what `open_clip.create_model_and_transforms(
        "local-dir:FOLDER")` loads."""
        preprocessing = dict(self.model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
        preprocessing.pop("size", None)
        config = {"model_cfg": self.config, "preprocess_cfg": preprocessing}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    image_size: int | None = None,
    patch_dropout: float | None = None,
    siglip: bool = False,
    augmentation: Mapping[str, Any] | None = None,
) -> ClipModel:
    """A model of open_clip in float32.

    Args:
        name: of open_clip's models or of those in `model_configs`, or the path of a JSON file that
            describes one, or 'local-dir:FOLDER', 'hf-hub:ID'.
        pretrained: a tag of open_clip's, or a file of weights; without it the weights are random.
        image_size: other than the model's; position embeddings are interpolated.
        siglip: with a bias of the logits, as the sigmoid loss needs.
        augmentation: fields of `open_clip.AugmentationCfg`.

    Raises:
        ValueError: open_clip knows no such model, weights or augmentation, or it cannot be built.
    """
    name, config = _config(name)
    if image_size is not None:
        _check_image_size(image_size, config)
    extra: dict[str, Any] = {"nonscalar_logit_scale": True}  # a scalar cannot be sharded
    if siglip and "init_logit_bias" not in config:
        extra |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    schema, _ = parse_model_name(name)
    if pretrained is not None and schema is not None:
        rule = f"the model {name} brings weights of its own"
        raise refusal("pretrained", pretrained, rule, "Leave out one of the two")
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            known = ", ".join(tags) or "none"
            rule = f"neither a file nor a tag of {name} (tags: {known})"
            raise refusal("pretrained", pretrained, rule, "Use one of these")
    try:
        with _quiet():
            model = open_clip.create_model(
                name,
                pretrained,
                force_image_size=image_size,
                force_patch_dropout=patch_dropout,
                require_pretrained=schema is not None,
                output_dict=True,
                **extra,
            )
    except (RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
        option = "model" if pretrained is None else "pretrained"
        value = name if pretrained is None else pretrained
        cure = "Check the configuration, and that these weights are of this model"
        reason = shorten(str(error), 300, placeholder=" ...").rstrip(".")
        raise refusal(option, value, f"open_clip cannot build it ({reason})", cure) from error
    if is_coca(model) and pretrained is None and schema is None:
        # open_clip 3.3 leaves it as the memory was; this is the deviation it means to give it.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    if siglip and (is_coca(model) or model.logit_bias is None):
        rule = f"{type(model).__name__} has no sigmoid loss"
        raise refusal("siglip", True, rule, "Use a model without a decoder")
    if siglip and pretrained is not None and not model.logit_bias.any():
        logger.warning(
            f"{pretrained} has no bias of the logits, which begins at 0, with the scale of its "
            "softmax loss; SigLIP begins at -10 and 10."
        )
    _answer_to_the_trainer(model)
    preprocessing = PreprocessCfg(**model.visual.preprocess_cfg)
    try:
        augmented = open_clip.AugmentationCfg(**(augmentation or {}))
        train_transform = image_transform_v2(preprocessing, True, aug_cfg=augmented)
    except (TypeError, ValueError, AssertionError) as error:
        cure = "Use the fields of open_clip.AugmentationCfg, such as 'scale': [0.9, 1.0]"
        raise refusal("augmentation", augmentation, str(error), cure) from error
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ImportError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        rule = f"its tokenizer cannot be loaded ({reason})"
        cure = "open_clip takes it from the hub for names that contain siglip: check the network"
        raise refusal("model", name, rule, cure) from error
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if siglip:
        config.setdefault("init_logit_bias", -10.0)
        config.setdefault("init_logit_scale", math.log(10))
    return ClipModel(
        model=model,
        tokenizer=tokenizer,
        train_transform=train_transform,
        eval_transform=image_transform_v2(preprocessing, False),
        config=config,
    )


def is_coca(model: nn.Module) -> bool:
    """Whether it decodes captions too."""
    return isinstance(model, open_clip.CoCa)


def _answer_to_the_trainer(model: nn.Module) -> None:
    """What the Trainer asks of a model, by the names that models of transformers have for it."""

    def enable(**kwargs: Any) -> None:
        model.set_grad_checkpointing()  # type: ignore[operator]

    model.activation_checkpointing_enable = enable  # type: ignore[assignment]
    model.gradient_checkpointing_enable = enable  # type: ignore[assignment]
    blocks = {type(m).__name__ for m in model.modules()} & set(_BLOCKS)
    model._no_split_modules = sorted(blocks)  # type: ignore[assignment]


def _config(name: str) -> tuple[str, dict[str, Any]]:
    """The name open_clip knows the model by, and its architecture."""
    own = Path(__file__).with_name("model_configs") / f"{name}.json"
    path = own if own.is_file() else Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise refusal("model", name, "no such file", "Give the path of a JSON file")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise refusal(
                "model", name, f"not JSON ({error})", "Write it as open_clip's"
            ) from error
        if not isinstance(config, dict):
            raise refusal("model", name, "not a mapping", "Write it as open_clip's model_configs")
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
        if missing:
            rule = f"has no {', '.join(sorted(missing))}"
            raise refusal("model", name, rule, "Write it as open_clip's model_configs")
        open_clip.add_model_config(path)
        return path.stem, config
    try:
        known = get_model_config(name)
    except (OSError, ValueError) as error:
        raise refusal("model", name, f"cannot be read ({error})", "Check the name") from error
    if known is None:
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, open_clip.list_models(), 3)) or "ViT-B-32"
        cure = f"Use one of open_clip.list_models(), as {near}, or the path of a JSON file"
        raise refusal("model", name, "open_clip has no such model", cure)
    return name, known


def _check_image_size(image_size: int, config: Mapping[str, Any]) -> None:
    if image_size < 1:
        raise refusal("image_size", image_size, "must be at least 1", "Give a number of pixels")
    patch = config["vision_cfg"].get("patch_size")
    if patch is not None and image_size % patch:
        rule = f"not a multiple of the model's patches of {patch} pixels"
        near = max(1, round(image_size / patch)) * patch
        raise refusal("image_size", image_size, rule, f"Use {near}, or another multiple")


def text_features(model: nn.Module, text: Tensor, with_image: bool, image_size: Any) -> Tensor:
    """Normalised features (n, D) of texts (n, context length); of CoCa `with_image`."""
    if not with_image:
        features: Tensor = model(text=text)["text_features"]
        return features
    # Its forward pass decodes the text against an image: any will do.
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    blank = model(torch.zeros(1, 3, *size, device=text.device))
    n = len(text)
    outputs = model(
        None,
        text,
        image_latent=blank["image_features"].expand(n, -1),
        image_embs=blank["image_embs"].expand(n, -1, -1),
    )
    features = outputs["text_features"]
    return features


def lock(
    model: nn.Module,
    *,
    image: bool = False,
    unlocked_groups: int = 0,
    freeze_bn_stats: bool = False,
    text: bool = False,
    unlocked_layers: int = 0,
) -> None:
    """Freeze the image tower but for its last groups of layers, or the text tower.

    Raises:
        ValueError: open_clip cannot freeze this tower in part.
    """
    towers = [
        ("lock_image", image, "lock_image_tower", (unlocked_groups, freeze_bn_stats)),
        ("lock_text", text, "lock_text_tower", (unlocked_layers,)),
    ]
    for option, wanted, method, arguments in towers:
        if not wanted:
            continue
        try:
            getattr(model, method)(*arguments)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            rule = f"{type(model).__name__} cannot be locked so ({error})"
            cure = "Lock it whole, or train it; CoCa cannot be locked"
            raise refusal(option, True, rule, cure) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns on the root logger that weights are random, which was asked for."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)

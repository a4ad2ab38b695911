"""CLIP models of transformers, called as open_clip's are."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from nso_hf.refusal import refusal
from nso_hf.tasks.clip.models import ClipModel


class OfTransformers(nn.Module):
    """A `CLIPModel` with the forward pass of open_clip's models: features of length 1 of what it is
    given."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        config: Any = model.config.vision_config
        self.model, self.visual = model, _Visual(config.image_size)

    @property
    def logit_scale(self) -> Tensor:
        """Its logarithm."""
        return self.model.logit_scale

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """For images (n, 3, H, W), texts (m, context length), or both."""
        found = {"logit_scale": self.logit_scale.exp()}
        if image is not None:
            seen = self.model.vision_model(pixel_values=image).pooler_output
            found["image_features"] = normalize(self.model.visual_projection(seen), dim=-1)
        if text is not None:
            read = self.model.text_model(input_ids=text).pooler_output
            found["text_features"] = normalize(self.model.text_projection(read), dim=-1)
        return found


class _Visual(nn.Module):
    """What is asked of a tower of open_clip."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size


def load_clip_of_transformers(folder: str) -> ClipModel:
    """The model in float32, with the tokenizer and the processor of images beside it.

    Raises:
        ValueError: one of them cannot be read.
    """
    try:
        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        processor: Any = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        cure = "Give a folder with a CLIPModel, its tokenizer and its image processor"
        raise refusal("checkpoint", folder, reason, cure) from error
    text = model.config.text_config
    length = text.max_position_embeddings

    def tokens(texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        asked = [texts] if isinstance(texts, str) else list(texts)
        how = {"padding": "max_length", "truncation": True, "max_length": context_length or length}
        found: Tensor = tokenizer(asked, return_tensors="pt", **how)["input_ids"]
        return found

    def pixels(image: Image.Image) -> Tensor:
        found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found

    config = {"text_cfg": {"context_length": length, "vocab_size": text.vocab_size}}
    return ClipModel(OfTransformers(model), tokens, pixels, pixels, config)

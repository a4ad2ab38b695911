"""Masked autoencoders of transformers, encoding images of the task to come beside."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEModel, ViTMAEPreTrainedModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput


@dataclass
class PretrainingOutput(ViTMAEForPreTrainingOutput):
    """What transformers' model returns, and the representations."""

    representations: Tensor | None = None
    """(n, D), of the images of the task to come."""


class ViTMAEForPreTraining(transformers.ViTMAEForPreTraining):
    """That of transformers, whose one forward pass also encodes images of the task to come.

    In one pass, since what holds the weights of several processes sees to each call of the model.
    Its files are those of transformers' class.
    """

    def forward(
        self,
        pixel_values: Tensor,
        target_pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PretrainingOutput:
        """
        Args:
            pixel_values: to be masked and reconstructed, (N, C, S, S).
            target_pixel_values: of the task to come, (n, C, S, S).
            noise: the patches with the lowest are seen, (N, patches); random by default.
        """
        outputs = super().forward(pixel_values, noise=noise, return_dict=True)
        h = None
        if target_pixel_values is not None:
            h = representations(self.vit, target_pixel_values)
        return PretrainingOutput(**outputs, representations=h)


def representations(encoder: ViTMAEModel, pixel_values: Tensor) -> Tensor:
    """h(x): the mean over all patches, none being masked, of the encoder's last tokens (behind its
    layer norm, without that of the class).

    Args:
        pixel_values: (n, C, S, S).

    Returns:
        (n, D).
    """
    patches = encoder.embeddings.patch_embeddings.num_patches
    in_order = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1)
    with _unmasked(encoder):
        tokens: Tensor = encoder(pixel_values, noise=in_order).last_hidden_state
    return tokens[:, 1:].mean(dim=1)


@contextmanager
def _unmasked(encoder: ViTMAEModel) -> Iterator[None]:
    config = encoder.embeddings.config
    ratio = config.mask_ratio
    config.mask_ratio = 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


class ViTMAEForImageClassification(ViTMAEPreTrainedModel):
    """A linear head on the representations."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__(config)
        self.vit = ViTMAEModel(config)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 2))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """
        Args:
            pixel_values: (N, C, S, S).
            labels: (N,).
        """
        logits = self.classifier(representations(self.vit, pixel_values))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def new_autoencoder(config: ViTMAEConfig) -> ViTMAEForPreTraining:
    """One with random weights, those of linear layers as in the paper (arXiv 2111.06377, A.1): of
    a spread that falls with the width, which transformers' does not."""
    model = ViTMAEForPreTraining(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    # transformers, to 5.24, leaves the position embeddings of a new model zero.
    embeddings: Any = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    return _with_fixed_positions(model)


def load_autoencoder(name: str, **options: Any) -> ViTMAEForPreTraining:
    """One with the weights of a folder or of the hub, in float32.

    Args:
        options: of the configuration, such as `mask_ratio`.
    """
    model = ViTMAEForPreTraining.from_pretrained(name, dtype=torch.float32, **options)
    return _with_fixed_positions(model)


def classifier_of(autoencoder: ViTMAEForPreTraining, classes: int) -> ViTMAEForImageClassification:
    """A copy of its encoder with a new head for so many classes."""
    config = copy.deepcopy(autoencoder.config)
    config.num_labels = classes
    model = ViTMAEForImageClassification(config)
    model.vit.load_state_dict(autoencoder.vit.state_dict())
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    return model


def _with_fixed_positions(model: ViTMAEForPreTraining) -> ViTMAEForPreTraining:
    # Loading makes parameters of them that are trained.
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return model

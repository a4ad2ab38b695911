r"""The contrastive loss of a batch whose parts lie on several processes.

For normalised features x_i of N images and y_j of their texts, with scale s and bias b,

    softmax (CLIP, arXiv 2103.00020)      L = -1/2N sum_i log softmax_j(s x_i.y_j)_i
                                              -1/2N sum_j log softmax_i(s x_i.y_j)_j
    sigmoid (SigLIP, arXiv 2303.15343)    L = -1/N sum_ij log sigmoid(z_ij (s x_i.y_j + b)),
                                              z_ii = 1, else -1

These are open_clip's. Where the N pairs come in micro-batches m with features F_m, the gradient

    dL/dW = sum_m dL/dF_m dF_m/dW

is added up micro-batch by micro-batch, the other features being constants (`CLIPTrainer`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nso_hf.refusal import needs

needs("nso_hf.tasks.clip", "clip", "open_clip")

import open_clip  # noqa: E402
from open_clip.loss import SigLipLoss  # noqa: E402


def contrastive_loss(
    model: nn.Module,
    *,
    process: int = 0,
    processes: int = 1,
    local_loss: bool = True,
    caption_weight: float = 2.0,
    contrastive_weight: float = 1.0,
) -> nn.Module:
    """open_clip's loss for the outputs of `model`: sigmoid where it has a bias of the logits, with
    the caption's where it has a decoder, else softmax.

    With several processes it is of the features of all of them, and its gradient too: the mean over
    processes of the losses has the gradient of the loss of the whole batch. `local_loss` computes
    on each process the rows of the logits that are its own; otherwise each computes all of them.
    """
    options: dict[str, Any] = {"rank": process, "world_size": processes}
    loss: nn.Module
    if isinstance(model, open_clip.CoCa):
        loss = open_clip.CoCaLoss(
            caption_loss_weight=caption_weight,
            clip_loss_weight=contrastive_weight,
            pad_id=model.pad_id,
            local_loss=local_loss,
            gather_with_grad=True,
            **options,
        )
    elif getattr(model, "logit_bias", None) is not None:
        loss = SigLipLoss(dist_impl="gather", **options)
    else:
        loss = open_clip.ClipLoss(local_loss=local_loss, gather_with_grad=True, **options)
    return loss


def loss_of(loss: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
    """The scalar loss of a model's outputs, the sum of its parts."""
    total: Tensor = sum(loss(**outputs, output_dict=True).values())
    return total.squeeze()

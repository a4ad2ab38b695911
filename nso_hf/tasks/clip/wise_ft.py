"""Weights between those that fine-tuning began with and those that it ended with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nso_hf.backends import Weight
from nso_hf.refusal import check_range
from nso_hf.step.perturbation import borrowed
from nso_hf.step.side_effects import Buffers


class FirstWeights:
    """The trainable weights and the buffers of a model as they are now, in memory of the CPU.

    To be taken before a trainer is made, in every process, while weights are whole: also where a
    run goes on from a checkpoint, which is loaded later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._buffers = {name: b.detach().cpu().clone() for name, b in model.named_buffers()}

    @contextmanager
    def interpolated(self, trainer: Any, alpha: float) -> Iterator[None]:
        """Inside, the model of an `NSOTrainer` is at

            (1 - alpha) W_0 + alpha W

        with the first weights W_0 and those now, W (WiSE-FT; Wortsman et al., CVPR 2022, arXiv
        2109.01903, equation 1); floating-point buffers too. Afterwards it is at W, bit for bit. On
        all processes at once, however they hold the weights.

        Raises:
            ValueError: alpha is not in [0, 1].
        """
        check_range("alpha", alpha, 0, 1, "0 are the first weights, 1 those after training")
        backend, weights = trainer.nso_weights()
        trained = [weight for weight in weights if weight.name in self._weights]
        module = backend.module
        with Buffers(module).kept(), borrowed(trained, backend) as perturbation:
            perturbation.move_to(_Between(self._weights, alpha))
            for name, buffer in module.named_buffers():
                first = self._buffers[name].to(buffer.device)
                # Of those that stay, masks of attention are infinite.
                if buffer.is_floating_point() and not torch.equal(first, buffer):
                    buffer.copy_(_between(first, buffer, alpha))
            yield


@dataclass(eq=False)
class _Between:
    """The displacement from W to (1 - alpha) W_0 + alpha W."""

    first: dict[str, Tensor]
    alpha: float

    def add_to(self, weights: Sequence[Weight]) -> None:
        for weight in weights:
            data, whole = weight.data, self.first[weight.name].flatten()
            part = whole[weight.start : weight.start + data.numel()].to(data.device)
            data.copy_(_between(part.view(data.shape), data, self.alpha))


def _between(first: Tensor, last: Tensor, alpha: float) -> Tensor:
    """Exactly the first at 0, and the last at 1; in float32 at least."""
    wide = torch.promote_types(last.dtype, torch.float32)
    return torch.lerp(first.to(wide), last.to(wide), alpha)

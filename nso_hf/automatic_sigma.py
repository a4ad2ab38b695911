"""Sigma that is found by its effect where the method begins, and held by it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer
from transformers.utils import logging

from nso_hf.arguments import NSOArguments
from nso_hf.backends import Weight
from nso_hf.curvature.batches import Batch
from nso_hf.curvature.sigma import LEAST_IN_HALF, find_sigma
from nso_hf.refusal import Refusal, refusal
from nso_hf.step.sigma import AUTO, RISE

logger = logging.get_logger(__name__)

_BATCHES = 4  # of `per_device_train_batch_size`, however many processes there are
_SAMPLES = 16
_GAIN = 0.05  # of the controller, in log sigma for each log that shows no rise at all
_HIGHEST = 10.0  # times the target: a rise counts as no more
_FARTHEST = 10.0  # times the sigma that was found


def _without_statistics(model: nn.Module | None) -> str | None:
    """A BatchNorm whose running mean and variance are still 0 and 1."""
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, _BatchNorm):
            mean, variance = module.running_mean, module.running_var
            if mean is None or variance is None:
                continue
            if not mean.any() and torch.all(variance == 1):
                return str(name)
    return None


class AutomaticSigma:
    """The sigma in use where `sigma` is "auto"."""

    def __init__(self) -> None:
        self.value: float | None = None  # not found yet
        self._found = self._target = math.nan

    def find(
        self,
        trainer: Trainer,
        args: NSOArguments,
        weights: Sequence[Weight],
        first_batches: Callable[[int], list[Batch]],
    ) -> None:
        """Find it on the first batches of the training data, in all processes together.

        Raises:
            ValueError: there is no such sigma, or no batch to find it on, or BatchNorm has no
                statistics yet for the evaluation mode in which it is measured.
        """
        if name := _without_statistics(trainer.model):
            rule = f"it is found in evaluation mode, and {name} has met no batch for that yet"
            cure = "Set start, such as 0.1, for plain steps before, or a number"
            raise refusal("sigma", AUTO, rule, cure)
        names = [f"^{re.escape(weight.name)}$" for weight in weights]
        self._target = args.sigma_rise
        is_half = any(weight.element_size() < 4 for weight in trainer.model.parameters())  # type: ignore[union-attr]
        if is_half and args.sigma_rise == RISE:  # which nobody asked for
            self._target = LEAST_IN_HALF
        try:
            found = find_sigma(
                trainer,
                first_batches(_BATCHES),
                rise=self._target,
                sigma_scale=args.sigma_scale,
                params=names,
                num_samples=_SAMPLES,
                seed=trainer.args.seed,
            )
        except Refusal as error:
            rule = f"none was found. {str(error).rstrip('.')}"
            cure = "Or set a number, or start: weights that know nothing have nothing to lose"
            raise refusal("sigma", AUTO, rule, cure) from error
        self.value = self._found = found.sigma
        if trainer.is_world_process_zero():
            logger.warning(
                f"sigma {found.sigma:.3g} ± {found.stderr:.1g} ({args.sigma_scale}) raises the "
                f"loss of {found.num_examples} training examples by {self._target:.3g} of it."
            )

    def hold(self, rise: float) -> None:
        """Change it a little, by the rise that was measured: towards a mean of what was asked."""
        if self.value is None or not math.isfinite(rise):
            return
        change = _GAIN * (1 - min(_HIGHEST, max(0.0, rise / self._target)))
        low, high = self._found / _FARTHEST, self._found * _FARTHEST
        self.value = min(high, max(low, self.value * math.exp(change)))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "found": self._found, "target": self._target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._found, self._target = (state[key] for key in ("value", "found", "target"))

r"""Noise stability: how much the loss rises under the noise that NSO trains with,

    gap = E f(W + U) - f(W) = sigma^2/2 Tr H + O(sigma^4),    U ~ N(0, sigma^2 I).

Each draw is evaluated at both signs, [f(W+U) + f(W-U)]/2 - f(W), which leaves out the odd terms.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.trace import check_count
from nso_hf.refusal import refusal
from nso_hf.step.noise import Noise


@dataclass(frozen=True, kw_only=True)
class NoiseStability(Measurement):
    """The rise of the loss under noise, with its standard error."""

    gap: float
    """E f(W + U) - f(W)."""
    stderr: float
    """Of the draws, and the rounding of the loss in float32."""
    loss: float
    """f(W)."""
    sigma: float
    num_samples: int
    """Draws of U, each evaluated at W + U and W - U."""
    samples: Tensor = field(repr=False)
    """The rise of each draw, float64 [samples]."""

    @property
    def trace_estimate(self) -> float:
        """2 gap / sigma^2: the trace of the Hessian but for O(sigma^2)."""
        return 2 * self.gap / self.sigma**2

    @property
    def trace_stderr(self) -> float:
        return 2 * self.stderr / self.sigma**2


def noise_stability(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    sigma: float,
    num_samples: int = 100,
    params: Selection = "trainable",
    seed: int = 0,
) -> NoiseStability:
    """E f(W + U) - f(W) of the mean loss f over `batches`, from forward passes alone.

    Args:
        model, batches, params: as in `hessian_trace`.
        sigma: standard deviation of the noise in each weight.
        num_samples: draws of U; each takes two forward passes over the batches.

    Raises:
        ValueError: an option, or the model's loss, is refused.
    """
    check_count("num_samples", num_samples)
    check_sigma(sigma)
    watch, objective = Stopwatch(), Objective(model, batches, params)
    with (
        objective.opened() as perturbation,
        objective.progress("Noise stability", num_samples) as bar,
    ):
        clean = objective.losses().sum()
        rises = []
        for sample in range(num_samples):
            noise, perturbed = Noise(seed, sample, 0, sigma), []
            for sign in (1, -1):
                perturbation.move_to(noise, sign)
                perturbed.append(objective.losses().sum())
            rises.append(sum(perturbed) / 2 - clean)
            bar.update()
    samples = torch.stack(rises)
    stderr = samples.std().item() / math.sqrt(num_samples) if num_samples > 1 else math.nan
    gap, rounding = samples.mean().item(), torch.finfo(torch.float32).eps * clean.abs().item()
    close = f"the rise is close to the rounding of the loss ({rounding:.1g}): use a larger sigma"
    notes = (close,) if abs(gap) < 10 * rounding else ()
    return NoiseStability(
        gap=gap,
        stderr=math.hypot(stderr, rounding),
        loss=clean.item(),
        sigma=sigma,
        num_samples=num_samples,
        samples=samples,
        notes=(*objective.notes, *notes),
        **watch.fields(objective),
    )


def check_sigma(sigma: float) -> None:
    if not (isinstance(sigma, (int, float)) and 0 < sigma < math.inf):
        rule = "must be a positive number"
        raise refusal("sigma", sigma, rule, "Use the sigma of training, such as 0.01")

r"""Noise stability: how much the loss rises under the noise that NSO trains with,

    gap = E f(W + U) - f(W) = sigma^2/2 Tr H + O(sigma^4),    U ~ N(0, sigma^2 I),

or sigma^2/2 Tr(D H D) for U ~ N(0, sigma^2 D^2), D being the root mean square of each row. Each
draw is evaluated at both signs, [f(W+U) + f(W-U)]/2 - f(W), which leaves out the odd terms.
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
from nso_hf.refusal import check_choice, refusal
from nso_hf.step.noise import Noise
from nso_hf.step.perturbation import Perturbation
from nso_hf.step.rows import RowNoise, overall_rms, row_rms
from nso_hf.step.sigma import SCALES


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
    sigma_scale: str
    num_samples: int
    """Draws of U, each evaluated at W + U and W - U."""
    samples: Tensor = field(repr=False)
    """The rise of each draw, float64 [samples]."""

    @property
    def trace_estimate(self) -> float:
        """2 gap / sigma^2: the trace of the Hessian H but for O(sigma^2), or of D H D."""
        return 2 * self.gap / self.sigma**2

    @property
    def trace_stderr(self) -> float:
        return 2 * self.stderr / self.sigma**2


class Rises:
    """The rise of the loss of an opened objective at any sigma, with the same draws.

    Args:
        sigma_scale: "absolute" or "relative".
    """

    def __init__(
        self, objective: Objective, perturbation: Perturbation, seed: int, sigma_scale: str
    ) -> None:
        self._objective, self._perturbation = objective, perturbation
        self._seed, self._is_relative = seed, sigma_scale == "relative"
        self._rms = row_rms(objective.weights, objective.backend)
        everywhere = overall_rms(objective.weights, objective.backend)
        # A sigma as large as the weights.
        self.unit = 1.0 if self._is_relative else everywhere.item()
        self._loss = objective.losses().sum()

    @property
    def clean(self) -> float:
        """f(W)."""
        return self._loss.item()

    def of(self, sigma: float, sample: int) -> Tensor:
        """[f(W+U) + f(W-U)]/2 - f(W) of one draw: a scalar in float64."""
        drawn = (self._seed, sample, 0, sigma)
        U = RowNoise(*drawn, rows=self._rms) if self._is_relative else Noise(*drawn)
        perturbed = []
        for sign in (1, -1):
            self._perturbation.move_to(U, sign)
            perturbed.append(self._objective.losses().sum())
        return (perturbed[0] + perturbed[1]) / 2 - self._loss


def noise_stability(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    sigma: float,
    sigma_scale: str = "absolute",
    num_samples: int = 100,
    params: Selection = "trainable",
    seed: int = 0,
) -> NoiseStability:
    """E f(W + U) - f(W) of the mean loss f over `batches`, from forward passes alone.

    Args:
        model, batches, params: as in `hessian_trace`.
        sigma: standard deviation of the noise in each weight.
        sigma_scale: "absolute", or "relative": in units of the root mean square of each row.
        num_samples: draws of U; each takes two forward passes over the batches.

    Raises:
        ValueError: an option, or the model's loss, is refused.
    """
    check_count("num_samples", num_samples)
    check_sigma(sigma)
    check_choice("sigma_scale", sigma_scale, list(SCALES))
    watch, objective = Stopwatch(), Objective(model, batches, params)
    with (
        objective.opened() as perturbation,
        objective.progress("Noise stability", num_samples) as bar,
    ):
        rises = Rises(objective, perturbation, seed, sigma_scale)
        found = []
        for sample in range(num_samples):
            found.append(rises.of(sigma, sample))
            bar.update()
    samples, loss = torch.stack(found), rises.clean
    stderr = samples.std().item() / math.sqrt(num_samples) if num_samples > 1 else math.nan
    gap, rounding = samples.mean().item(), torch.finfo(torch.float32).eps * abs(loss)
    close = f"the rise is close to the rounding of the loss ({rounding:.1g}): use a larger sigma"
    notes = (close,) if abs(gap) < 10 * rounding else ()
    return NoiseStability(
        gap=gap,
        stderr=math.hypot(stderr, rounding),
        loss=loss,
        sigma=sigma,
        sigma_scale=sigma_scale,
        num_samples=num_samples,
        samples=samples,
        notes=(*objective.notes, *notes),
        **watch.fields(objective),
    )


def check_sigma(sigma: float) -> None:
    if not (isinstance(sigma, (int, float)) and 0 < sigma < math.inf):
        rule = "must be a positive number"
        raise refusal("sigma", sigma, rule, "Use the sigma of training, such as 0.01")

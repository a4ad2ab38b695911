r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

The density phi(t) = 1/n sum_i delta(t - lambda_i) is approximated for each of several random
vectors v by sum_j s_1j^2 delta(t - theta_j), (theta_j, s_j) being the eigenpairs of the matrix T
of m Lanczos steps from v (Golub and Welsch 1969; Ghorbani, Krishnan and Xiao 2019).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.hessian import hessian_of
from nso_hf.curvature.lanczos import Lanczos
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.trace import Estimate, check_count
from nso_hf.refusal import refusal


@dataclass(frozen=True, kw_only=True)
class Spectrum(Measurement):
    """A quadrature of the density of eigenvalues, one row for each random vector."""

    nodes: Tensor = field(repr=False)
    """Ritz values, float64 [samples, steps]."""
    weights: Tensor = field(repr=False)
    """The share of all eigenvalues that each stands for; a row adds up to 1."""
    num_samples: int
    num_steps: int

    def density(self, at: Tensor, width: float | None = None) -> Tensor:
        """phi at the points `at`, each node blurred to a Gaussian of standard deviation `width`,
        by default a hundredth of the range of the nodes; it integrates to 1."""
        if width is None:
            width = 0.01 * (self.nodes.max() - self.nodes.min()).item() or 1e-12
        z = (at.double().reshape(-1, 1, 1) - self.nodes) / width
        bumps = torch.exp(-z.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (bumps * self.weights).sum(dim=2).mean(dim=1).reshape(at.shape)

    def moment(self, power: int) -> Estimate:
        """Tr H^power with its standard error: of power 1 the trace, of 2 the squared Frobenius
        norm.

        Raises:
            ValueError: the quadrature is not exact for it, beyond 2 num_steps - 1.
        """
        if power > 2 * self.num_steps - 1:
            rule = f"{self.num_steps} Lanczos steps give moments up to {2 * self.num_steps - 1}"
            raise refusal("power", power, rule, "Use more num_steps")
        sums = self.num_parameters * (self.weights * self.nodes**power).sum(dim=1)
        stderr = sums.std().item() / math.sqrt(len(sums)) if len(sums) > 1 else math.nan
        return Estimate(sums.mean().item(), stderr)


def hessian_spectrum(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    params: Selection = "trainable",
    num_samples: int = 4,
    num_steps: int = 30,
    hvp: str = "auto",
    seed: int = 0,
) -> Spectrum:
    """The density of the eigenvalues of the Hessian of the mean loss over `batches`.

    Args:
        model, batches, params, hvp: as in `hessian_trace`.
        num_samples: random vectors, each the start of a Lanczos iteration.
        num_steps: products with the Hessian for each of them, m above; so many vectors of the
            weights' size are held.

    Raises:
        ValueError: an option, or the model's loss, is refused.
    """
    check_count("num_samples", num_samples)
    check_count("num_steps", num_steps)
    watch, objective = Stopwatch(), Objective(model, batches, params)
    steps = min(num_steps, objective.vectors.dimension)
    nodes = torch.zeros(num_samples, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    products = num_samples * steps
    with hessian_of(objective, hvp, products, "Spectrum") as hessian:
        for sample in range(num_samples):
            lanczos = Lanczos(hessian, objective.vectors.draw(seed, sample), steps)
            while not lanczos.is_full:
                lanczos.extend()
                if lanczos.beta == 0:
                    break
            values, coefficients = lanczos.ritz()
            nodes[sample] = values[-1]  # where the iteration ended early, nodes of weight 0
            nodes[sample, : len(values)] = values
            weights[sample, : len(values)] = coefficients[0].square()
            del lanczos  # its basis, before the next is made
    return Spectrum(
        nodes=nodes,
        weights=weights,
        num_samples=num_samples,
        num_steps=steps,
        hvp=hessian.hvp,
        notes=tuple(hessian.notes),
        **watch.fields(objective),
    )

"""The extreme eigenvalues of the Hessian, by Lanczos iteration."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.hessian import hessian_of
from nso_hf.curvature.lanczos import Lanczos
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.trace import check_count
from nso_hf.refusal import refusal

logger = logging.get_logger(__name__)

WHICH: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": torch.abs,
}
"""Name -> the figure whose largest values are wanted: eigenvalues, their negatives, or their
absolute values."""


@dataclass(frozen=True, kw_only=True)
class Eigenvalues(Measurement):
    """Eigenvalues of the Hessian."""

    values: tuple[float, ...]
    """Descending."""
    residuals: tuple[float, ...]
    """||H x - lambda x|| of each, |x| = 1, and the error of the products (4e-6 of lambda by double
    backward, 5e-3 by differences, in float32): an eigenvalue is about as close as that. Where the
    residual is small against the gap to the next eigenvalue, it is far closer."""
    converged: bool
    """Whether the iteration brought every residual within the tolerance."""
    which: str
    num_products: int
    """Products with the Hessian."""


def hessian_eigenvalues(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    k: int = 1,
    which: str = "largest",
    params: Selection = "trainable",
    hvp: str = "auto",
    seed: int = 0,
    tolerance: float = 1e-4,
    max_products: int = 200,
    basis_size: int | None = None,
) -> Eigenvalues:
    """The `k` extreme eigenvalues of the Hessian of the mean loss over `batches`.

    Of an eigenvalue that occurs several times, not all copies need be found.

    Args:
        model, batches, params, hvp: as in `hessian_trace`.
        which: "largest", "smallest" (the most negative), or "magnitude" (largest absolute value).
        tolerance: residuals to reach, relative to the eigenvalue (or to a hundredth of the
            spectral radius, where that is more).
        max_products: products with the Hessian at most; a warning where they do not suffice.
        basis_size: vectors of the weights' size that are held, at least k + 2; default
            max(20, 2 k + 1). Fewer take less memory and more products.

    Raises:
        ValueError: an option, or the model's loss, is refused.
    """
    check_count("k", k)
    check_count("max_products", max_products, low=k)
    if which not in WHICH:
        raise refusal("which", which, "unknown", f"Choose one of {', '.join(map(repr, WHICH))}")
    check_tolerance(tolerance)
    size = max(20, 2 * k + 1) if basis_size is None else basis_size
    check_count("basis_size", size, low=k + 2)
    watch, objective = Stopwatch(), Objective(model, batches, params)
    if k > objective.vectors.dimension:
        rule = f"there are {objective.vectors.dimension} weights"
        raise refusal("k", k, rule, "Ask for fewer eigenvalues")
    with hessian_of(objective, hvp, None, "Eigenvalues") as hessian:
        size = min(size, objective.vectors.dimension)
        lanczos = Lanczos(hessian, objective.vectors.draw(seed, 0, "normal"), size)
        settled: Tensor | None = None
        for product in range(1, max_products + 1):
            lanczos.extend()
            values, coefficients = lanczos.ritz()
            order = WHICH[which](values).argsort(descending=True)
            best = order[:k]
            residuals = lanczos.residuals(coefficients[:, best])
            floor = 0.01 * values.abs().max()
            reached = residuals <= tolerance * values[best].abs().clamp(min=floor)
            is_done = len(best) == k and bool(reached.all())
            if is_done and lanczos.beta == 0 and lanczos.length < objective.vectors.dimension:
                # All that the first vector leads to is found, but not further copies of it: until
                # a new vector brings nothing more.
                is_done = settled is not None and torch.allclose(values[best], settled)
                settled = values[best]
            if is_done or product == max_products:
                break
            if lanczos.is_full:
                keep = order[: k + (size - k) // 2]
                lanczos.restart(values[keep], coefficients[:, keep])
            if lanczos.beta == 0:
                lanczos.renew(objective.vectors.draw(seed, product, "normal"))
    found = values[best]
    order = found.argsort(descending=True)
    if not is_done:
        logger.warning(
            f"{product} products with the Hessian did not bring {k} eigenvalues within the "
            f"tolerance {tolerance}: their residuals are {residuals.tolist()}. Raise max_products."
        )
    return Eigenvalues(
        values=tuple(found[order].tolist()),
        residuals=tuple(torch.hypot(residuals, hessian.error * found.abs())[order].tolist()),
        converged=is_done,
        which=which,
        num_products=product,
        hvp=hessian.hvp,
        notes=tuple(hessian.notes),
        **watch.fields(objective),
    )


def check_tolerance(tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise refusal("tolerance", tolerance, "must be in (0, 1)", "Typical: 1e-3 to 1e-5")

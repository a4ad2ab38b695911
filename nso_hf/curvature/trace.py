r"""The trace of the Hessian H from products with random vectors.

With v of independent elements +-1 (Rademacher), E v' H v = Tr H and

    hutchinson    Tr H ~ 1/m sum_i v_i' H v_i                               Hutchinson (1989)
    hutch++       Tr H ~ Tr Q' H Q + 1/s sum_i w_i' H w_i,  w = (I - Q Q') v
                  Q an orthonormal basis of H v_1 ... H v_s, m = 3 s        Meyer et al. (2021)

v_w' (H v)_w of the elements of one weight w alone estimates the trace of its block of H. With D v
for v that is Tr D H D: what noise penalises that is in units of D, the root mean squares of rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.hessian import Hessian, hessian_of
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.vectors import Vectors
from nso_hf.refusal import check_choice, refusal
from nso_hf.step.rows import row_rms
from nso_hf.step.sigma import SCALES


class Estimate(NamedTuple):
    estimate: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Trace(Measurement):
    """An estimate of the trace of the Hessian."""

    estimate: float
    stderr: float
    """Standard error of the estimate; nan of a single sample."""
    num_samples: int
    """Products with the Hessian."""
    method: str
    samples: Tensor = field(repr=False)
    """v' H v in float64: [samples, weights] of Hutchinson, [samples, 1] of the residual of
    Hutch++."""
    names: tuple[str, ...] = field(repr=False)
    """Of the weights."""

    @property
    def per_parameter(self) -> Mapping[str, Estimate]:
        """The trace of each parameter's block of the Hessian; they add up to the whole."""
        self._check_has_shares()
        columns = zip(self.names, self.samples.unbind(dim=1), strict=True)
        return {name: mean_of(column) for name, column in columns}

    @property
    def per_module(self) -> Mapping[str, Estimate]:
        """The trace of the block of each module's parameters, those of its submodules included."""
        self._check_has_shares()
        columns: dict[str, list[int]] = {}
        for column, name in enumerate(self.names):
            parts = name.split(".")
            for end in range(1, len(parts)):
                columns.setdefault(".".join(parts[:end]), []).append(column)
        return {name: mean_of(self.samples[:, c].sum(dim=1)) for name, c in columns.items()}

    def _check_has_shares(self) -> None:
        if self.method != "hutchinson":
            rule = "it has no estimate for a part of the weights"
            raise refusal("method", self.method, rule, "Use 'hutchinson'")


def mean_of(samples: Tensor) -> Estimate:
    stderr = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(samples.mean().item(), stderr)


def hessian_trace(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    params: Selection = "trainable",
    num_samples: int = 100,
    hvp: str = "auto",
    seed: int = 0,
    method: str = "hutchinson",
    sigma_scale: str = "absolute",
) -> Trace:
    """The trace of the Hessian of the mean loss over `batches`, with its standard error.

    Args:
        model: a model whose `model(**batch)` returns an object with a `loss`, or a Trainer, whose
            processes have to call this together.
        batches: dicts as the Trainer's collator makes them, the same in every process; by default
            a Trainer's training data.
        params: which weights (see `nso_hf.curvature.parameters.PRESETS`), or name patterns.
        num_samples: products with the Hessian, m above.
        hvp: "autograd", "finite_difference", or "auto": the first where it can be had.
        method: "hutchinson", or "hutch++", which needs far fewer products where few eigenvalues
            make up the trace, and holds num_samples/3 vectors of the weights' size.
        sigma_scale: "absolute", or "relative" for the trace of D H D.

    Raises:
        ValueError: an option, or the model's loss, is refused.
    """
    check_count("num_samples", num_samples)
    check_choice("method", method, list(ESTIMATORS))
    check_choice("sigma_scale", sigma_scale, list(SCALES))
    is_relative = sigma_scale == "relative"
    if is_relative and method != "hutchinson":
        rule = f"method {method!r} looks for eigenvectors of H"
        raise refusal("sigma_scale", sigma_scale, rule, "Use method='hutchinson'")
    watch, objective = Stopwatch(), Objective(model, batches, params)
    rows = row_rms(objective.weights, objective.backend) if is_relative else None
    with hessian_of(objective, hvp, num_samples, "Hessian trace") as hessian:
        draw = partial(objective.vectors.draw, seed, rows=rows)
        known, samples = ESTIMATORS[method](hessian, objective.vectors, num_samples, draw)
    residual = mean_of(samples.sum(dim=1))
    return Trace(
        estimate=known + residual.estimate,
        stderr=residual.stderr,
        num_samples=num_samples,
        method=method,
        samples=samples,
        names=tuple(weight.name for weight in objective.weights),
        hvp=hessian.hvp,
        notes=tuple(hessian.notes),
        **watch.fields(objective),
    )


Draw = Callable[[int], Tensor]
"""Number -> random vector."""


def _hutchinson(hessian: Hessian, vectors: Vectors, count: int, draw: Draw) -> tuple[float, Tensor]:
    return 0.0, hessian.forms(draw, count).sum(dim=0)


def _hutch_plus_plus(
    hessian: Hessian, vectors: Vectors, count: int, draw: Draw
) -> tuple[float, Tensor]:
    s = count // 3
    if s < 2:
        rule = "Hutch++ divides them by three, and needs two samples for a standard error"
        raise refusal("num_samples", count, rule, "Use at least 6")
    Q = torch.stack([hessian.times(draw(i)) for i in range(s)])
    Q = _orthonormal(vectors, Q)
    known = sum(vectors.dot(q, hessian.times(q)) for q in Q)

    def residual(i: int) -> Tensor:
        v = draw(s + i)
        return v - Q.T @ vectors.coefficients(Q, v).to(Q)

    samples = hessian.forms(residual, count - s - len(Q))
    return known, samples.sum(dim=(0, 2)).unsqueeze(1)


ESTIMATORS: dict[str, Callable[[Hessian, Vectors, int, Draw], tuple[float, Tensor]]] = {
    "hutchinson": _hutchinson,
    "hutch++": _hutch_plus_plus,
}
"""Name -> what is known exactly, and samples whose mean is the rest."""


def _orthonormal(vectors: Vectors, rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of `rows`, in their place: twice Gram-Schmidt, row by row.
    What depends on earlier rows is dropped."""
    rank = 0
    for row in rows.unbind():
        before = vectors.norm(row)
        for _ in range(2):
            if rank:
                row -= rows[:rank].T @ vectors.coefficients(rows[:rank], row).to(rows)
        norm = vectors.norm(row)
        if norm > 1e-5 * before:
            rows[rank] = row / norm
            rank += 1
    return rows[:rank]


def check_count(option: str, value: int, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise refusal(option, value, f"must be an integer, at least {low}", "Typical: 10 to 100")

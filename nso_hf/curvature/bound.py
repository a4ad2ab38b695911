r"""A PAC-Bayes bound on the loss of unseen examples, from the trace of the Hessian.

For a loss in [0, C], weights W trained from W_0 on n examples, r = |W - W_0|, alpha the largest
trace of the Hessian over the data, posterior N(W, s^2 I), prior N(W_0, s^2 I) and b in (0, 1), with
probability 1 - delta and up to O(s^3) (arXiv 2306.08553, section on generalisation),

    L(W) <= L_hat/b + (1-b)/(2b) s^2 alpha + C r^2/(4 b (1-b) n s^2) + C log(1/delta)/(2 b (1-b) n)

With the best b of a grid of 99, log(99/delta). alpha is taken over the measured batches.
The two middle terms are least at s*^2 = sqrt(C r^2/(2 alpha n))/(1-b), where they add up to
1/b sqrt(C alpha r^2/(2n)): the closed form. The paper gives its leading term as
sqrt(C alpha r^2/n).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.hessian import hessian_of
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.stability import check_sigma
from nso_hf.curvature.trace import check_count
from nso_hf.refusal import refusal

_GRID = [i / 100 for i in range(1, 100)]
"""Of b: for the bound to hold with the best of them, delta is divided by their number."""


@dataclass(frozen=True, kw_only=True)
class PacBayesBound(Measurement):
    """A bound on the expected loss, and all that went into it."""

    bound: float
    """The right-hand side at s = sigma, with the best b of a grid."""
    b: float
    closed_form: float
    """The same at s*, with its own best b. Since s* follows from the data, it is an estimate of
    what a good choice of s would give rather than a bound that holds with 1 - delta."""
    closed_form_b: float
    optimal_sigma: float
    """s* at that b; infinite where the trace is not positive."""
    leading_term: float
    """sqrt(C alpha r^2/n), the form of the paper."""
    empirical_loss: float
    """L_hat, of the measured batches."""
    largest_loss: float
    """Of a measured batch."""
    trace_max: float
    """alpha: the largest trace over the measured batches, from Hutchinson's estimates (0 where it
    is negative)."""
    trace_mean: float
    distance: float
    """r, over the selected weights."""
    num_train: int
    """n"""
    loss_bound: float
    """C, as given."""
    sigma: float
    delta: float
    num_samples: int


def pac_bayes_bound(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    reference: nn.Module | Mapping[str, Tensor],
    sigma: float,
    loss_bound: float,
    num_train: int | None = None,
    delta: float = 0.05,
    num_samples: int = 30,
    params: Selection = "trainable",
    hvp: str = "auto",
    seed: int = 0,
) -> PacBayesBound:
    """The bound for the mean loss over `batches`, which should be training data.

    Args:
        model, batches, params, hvp: as in `hessian_trace`.
        reference: W_0, where training began: a model, or its parameters by name, whole.
        sigma: s, the standard deviation of the posterior; of NSO, the sigma of training.
        loss_bound: C. The bound holds for a loss that cannot exceed it on any example, such as a
            cross-entropy clipped at C: it is the caller's word, checked against the mean loss of
            each batch alone.
        num_train: n, by default the number of examples in `batches`.
        num_samples: products with the Hessian for the trace of each batch.

    Raises:
        ValueError: an option is refused, `reference` lacks a parameter, or a batch's loss exceeds
            `loss_bound`.
    """
    check_sigma(sigma)
    check_count("num_samples", num_samples)
    if not 0 < delta < 1:
        raise refusal("delta", delta, "must be in (0, 1)", "Typical: 0.05")
    if not 0 < loss_bound < math.inf:
        raise refusal("loss_bound", loss_bound, "must be positive", "For 0-1 loss it is 1")
    # Every process evaluates every batch: the maximum is over batches, however many they are.
    watch, objective = Stopwatch(), Objective(model, batches, params, shared=False)
    n = objective.num_examples if num_train is None else num_train
    check_count("num_train", n)
    r = _distance(objective, reference)
    weights = torch.tensor(objective.weights_of_batches, dtype=torch.float64)
    with hessian_of(objective, hvp, num_samples, "PAC-Bayes bound") as hessian:
        losses = objective.losses() / weights
        if losses.max() > loss_bound * (1 + 1e-6):  # clipped at it, but for rounding
            rule = f"the mean loss of a batch is {losses.max():.4g}"
            cure = "Raise it, or clip the loss of each example at it"
            raise refusal("loss_bound", loss_bound, rule, cure)
        vectors = objective.vectors
        forms = hessian.forms(lambda i: vectors.draw(seed, i), num_samples)
    traces = forms.sum(dim=2).mean(dim=1) / weights
    empirical, alpha = float((losses * weights).sum()), max(0.0, traces.max().item())

    def at(b: float, middle: float) -> float:
        confidence = loss_bound * math.log(len(_GRID) / delta) / (2 * b * (1 - b) * n)
        return empirical / b + middle + confidence

    def explicit(b: float) -> float:
        rise = (1 - b) / (2 * b) * sigma**2 * alpha
        return at(b, rise + loss_bound * r**2 / (4 * b * (1 - b) * n * sigma**2))

    def closed(b: float) -> float:
        return at(b, math.sqrt(loss_bound * alpha * r**2 / (2 * n)) / b)

    b, closed_b = min(_GRID, key=explicit), min(_GRID, key=closed)
    best_variance = math.sqrt(loss_bound * r**2 / (2 * alpha * n)) if alpha > 0 else math.inf
    return PacBayesBound(
        bound=explicit(b),
        b=b,
        closed_form=closed(closed_b),
        closed_form_b=closed_b,
        optimal_sigma=math.sqrt(best_variance / (1 - closed_b)),
        leading_term=math.sqrt(loss_bound * alpha * r**2 / n),
        empirical_loss=empirical,
        largest_loss=losses.max().item(),
        trace_max=alpha,
        trace_mean=float((traces * weights).sum()),
        distance=r,
        num_train=n,
        loss_bound=loss_bound,
        sigma=sigma,
        delta=delta,
        num_samples=num_samples,
        hvp=hessian.hvp,
        notes=tuple(hessian.notes),
        **watch.fields(objective),
    )


def _distance(objective: Objective, reference: nn.Module | Mapping[str, Tensor]) -> float:
    """|W - W_0| over the selected weights; the others have to be as they were."""
    if isinstance(reference, nn.Module):
        reference = dict(reference.named_parameters())
    selected = {weight.index for weight in objective.weights}
    differences = []
    for weight in objective.all_weights:
        if weight.index not in selected and weight.name not in reference:
            continue
        before = reference.get(weight.name)
        if before is None or before.shape != weight.shape:
            found = None if before is None else tuple(before.shape)
            rule = f"{weight.name} has shape {tuple(weight.shape)} in the model"
            cure = "Pass the model as it was before training, whole"
            raise refusal("reference", found, rule, cure)
        if before.data_ptr() == weight.data.data_ptr() and weight.data.numel():
            rule = f"{weight.name} is the model's own tensor, not a copy of what it was"
            raise refusal(
                "reference", weight.name, rule, "Use copy.deepcopy(model) before training"
            )
        end = weight.start + weight.data.numel()
        part = before.detach().reshape(-1)[weight.start : end].to(weight.data)
        difference = weight.data - part.view(weight.data.shape)
        if weight.index in selected:
            differences.append(difference)
        elif difference.any():
            rule = f"{weight.name} was trained too, and the bound is for all that was"
            raise refusal("params", len(selected), rule, "Select every trained weight")
    return objective.vectors.norm(objective.vectors.join(differences))

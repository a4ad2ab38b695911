r"""Sigma by its effect: the deviation at which noise raises the loss by a given share of it,

    E f(W + sigma D Z) - f(W) = rise f(W),    Z ~ N(0, I),

with D = I, or the root mean square of each row. To second order that is sigma^2/2 Tr(D H D). Every
sigma is tried with the same Z, each at both signs, so that the rise is a smooth function of it; it
is interpolated in log sigma.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, stdev

from torch import nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.result import Measurement, Stopwatch
from nso_hf.curvature.stability import Rises
from nso_hf.curvature.trace import check_count
from nso_hf.refusal import Refusal, check_choice, refusal
from nso_hf.step.sigma import RISE, SCALES, check_rise

_FEW = 2  # draws of the search, before there are more
_LEAST, _MOST = 16, 400  # draws where nobody says how many
_PRECISE = 0.05  # of the rise: its standard error then
_CLOSE = 0.05  # of the target: from there on the law of powers is exact enough
_FARTHEST = 100.0  # times the root mean square of the weights
_TRIALS = 60
LEAST_IN_HALF = 0.01  # of a rise: bfloat16 has eight bits
_JUMP = 1.001  # two sigmas so close with rises far apart: the loss is not smooth between them


@dataclass(frozen=True)
class Point:
    """The rise at one sigma, as a share of the loss."""

    sigma: float
    rise: float
    """[E f(W + U) - f(W)]/f(W); infinite where the loss is."""
    stderr: float
    num_samples: int

    @classmethod
    def of(cls, sigma: float, shares: Sequence[float]) -> "Point":
        """Of its draws."""
        number = len(shares)
        if not all(map(math.isfinite, shares)):
            return cls(sigma, math.inf, math.nan, number)
        stderr = stdev(shares) / math.sqrt(number) if number > 1 else math.nan
        return cls(sigma, fmean(shares), stderr, number)


@dataclass(frozen=True, kw_only=True)
class SigmaFound(Measurement):
    """The sigma at which the loss rises by so much."""

    sigma: float
    stderr: float
    """Of sigma, from the draws."""
    rise: float
    """What was asked for: a share of the loss."""
    sigma_scale: str
    loss: float
    """f(W)."""
    num_samples: int
    """Draws of Z, each evaluated at both signs."""
    curve: tuple[Point, ...] = field(repr=False)
    """What was measured with all draws, by sigma."""


def find_sigma(
    model: nn.Module | Trainer,
    batches: Iterable[Batch] | None = None,
    *,
    rise: float = RISE,
    sigma_scale: str = "absolute",
    params: Selection = "trainable",
    num_samples: int | None = None,
    points: Iterable[float] = (),
    seed: int = 0,
) -> SigmaFound:
    """The sigma at which E f(W + U) - f(W) is `rise` times f(W), f being the mean loss over
    `batches`, from forward passes alone: 2 of each batch for each draw, and some 20 more.

    Args:
        model, batches, params: as in `hessian_trace`; all of `params` is displaced;
            "perturbed" is what training with NSO's defaults displaces.
        sigma_scale: "absolute", or "relative": in units of the root mean square of each row.
        num_samples: draws of U; None: as many as it takes for a standard error of 5 % of the rise,
            16 to 400.
        points: what else to measure for the curve, in multiples of the sigma that is found.

    Raises:
        ValueError: an option, or the model's loss, is refused; or no sigma has that effect.
    """
    if num_samples is not None:
        check_count("num_samples", num_samples)
    check_rise("rise", rise)
    check_choice("sigma_scale", sigma_scale, list(SCALES))
    watch, objective = Stopwatch(), Objective(model, batches, params, in_half=True)
    half = [w.data.dtype for w in objective.all_weights if w.data.element_size() < 4]
    if half and rise < LEAST_IN_HALF:
        rule = f"{half[0]} rounds the loss by about as much"
        cure = f"Ask for {LEAST_IN_HALF} at least, or load the model in float32"
        raise refusal("rise", rise, rule, cure)
    with (
        objective.opened() as perturbation,
        objective.progress("Sigma", None) as bar,
    ):
        rises = Rises(objective, perturbation, seed, sigma_scale)
        loss = rises.clean
        if loss <= 0:
            rule = f"the loss is {loss:.3g}, and a share of that no rise"
            cure = "Measure on batches whose loss is above 0, or set sigma yourself"
            raise refusal("batches", objective.num_batches, rule, cure)

        known: dict[float, list[float]] = {}

        def measured(sigma: float, least: int, most: int) -> Point:
            shares = known.setdefault(sigma, [])
            while len(shares) < least or (len(shares) < most and _is_rough(shares)):
                shares.append(rises.of(sigma, len(shares)).item() / loss)
                bar.update()
            return Point.of(sigma, shares[:most])

        unit = rises.unit
        few, first = min(_FEW, num_samples or _FEW), 0.05 * unit
        rough: list[Point] = []
        with suppress(Refusal):  # what few draws do not show, more may
            rough = _search(lambda sigma: measured(sigma, few, few), rise, first, unit)
            first = rough[-1].sigma
        number = num_samples or measured(first, _LEAST, _MOST).num_samples
        found = _search(lambda sigma: measured(sigma, number, number), rise, first, unit)
        last, power = found[-1], _power(found) or _power(rough) or 2.0
        sigma = last.sigma * (rise / last.rise) ** (1 / power)
        curve = found + [measured(factor * sigma, number, number) for factor in points]
    uncertain = "the rise is known to {:.0%} only: use more num_samples or batches"
    notes = [uncertain.format(last.stderr / last.rise)] if last.stderr > 0.2 * last.rise else []
    return SigmaFound(
        sigma=sigma,
        stderr=sigma * last.stderr / (power * last.rise),
        rise=rise,
        sigma_scale=sigma_scale,
        loss=loss,
        num_samples=number,
        curve=tuple(sorted(curve, key=lambda point: point.sigma)),
        notes=(*objective.notes, *notes),
        **watch.fields(objective),
    )


def _is_rough(shares: Sequence[float]) -> bool:
    point = Point.of(math.nan, shares)
    return not point.stderr <= _PRECISE * abs(point.rise)


def _search(
    measure: Callable[[float], Point], target: float, first: float, unit: float
) -> list[Point]:
    """Sigmas that were tried, the last of which has the target's rise but for a few per cent."""
    tried: list[Point] = []
    low: Point | None = None
    high: Point | None = None
    sigma = first
    while len(tried) < _TRIALS:
        point = measure(sigma)
        tried.append(point)
        if abs(point.rise / target - 1) <= _CLOSE:
            return tried
        low, high = (point, high) if point.rise < target else (low, point)
        if high is None and sigma >= _FARTHEST * unit:
            most = max(tried, key=lambda point: point.rise)
            rule = f"the loss rises by {most.rise:.2g} of itself at most, at sigma {most.sigma:.2g}"
            cure = "Ask for less, or displace weights that the loss depends on"
            raise refusal("rise", target, rule, cure)
        if low is not None and high is not None and high.sigma / low.sigma < _JUMP:
            break
        sigma = min(_next(low, high, target, len(tried)), _FARTHEST * unit)
    if low is None or high is None:
        rule = f"the loss rises by more at every sigma down to {tried[-1].sigma:.2g}"
        raise refusal("rise", target, rule, "Ask for more, or measure in float32")
    rule = f"at sigma {high.sigma:.3g} the loss jumps from {low.rise:.2g} to {high.rise:.2g} of it"
    raise refusal("rise", target, rule, "Ask for a rise below or above the jump")


def _next(low: Point | None, high: Point | None, target: float, number: int) -> float:
    """Where to look, below a sigma whose rise is too high and above one where it is too low."""
    if low is None or high is None:
        end = low or high
        assert end is not None
        steps = math.sqrt(target / end.rise) if end.rise > 0 else 8.0  # as in a quadratic
        factor = min(8.0, max(1.2, steps if high is None else 1 / max(steps, 1e-9)))
        return end.sigma * (factor if high is None else 1 / factor)
    share = 0.5
    if low.rise > 0 and math.isfinite(high.rise) and number % 3:
        share = math.log(target / low.rise) / math.log(high.rise / low.rise)
    return float(low.sigma * (high.sigma / low.sigma) ** min(0.95, max(0.05, share)))


def _power(tried: list[Point]) -> float | None:
    """That of sigma by which the rise grows, about the last point."""
    if not tried:
        return None
    last = tried[-1]
    others = [p for p in tried[:-1] if 0 < p.rise < math.inf and p.sigma != last.sigma]
    if not others:
        return None
    near = min(others, key=lambda point: abs(math.log(point.sigma / last.sigma)))
    slope = math.log(near.rise / last.rise) / math.log(near.sigma / last.sigma)
    return slope if slope > 0.5 else None

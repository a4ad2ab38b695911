"""The options that methods share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from nso_hf.refusal import check_choice, check_integer, check_positive, check_range, refusal
from nso_hf.step.noise import DISTRIBUTIONS
from nso_hf.step.sigma import AUTO, RISE, SCALES, check_rise

SIGMA_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "exponential": lambda progress: math.expm1(5 * progress) / math.expm1(5),
}
"""Name -> share of sigma in use at a `progress` of training in (0, 1]: from ~0 up to 1."""


@dataclass
class SharedOptions:
    """What NSO is set by. Other methods read some of it; what is theirs alone is in
    `method_kwargs`."""

    sigma: float | str | None = field(  # None: a parser of flags then takes numbers and words
        default=0.01,
        metadata={
            "help": "Standard deviation of the noise in each weight, >= 0. At 0 this is plain "
            "training. 'auto': found by sigma_rise, where the method begins."
        },
    )
    sigma_rise: float = field(
        default=RISE,
        metadata={"help": "The rise of the loss under noise of sigma 'auto', a share of it."},
    )
    sigma_hold: bool = field(
        default=False,
        metadata={"help": "Hold that rise during training: a forward pass more in logging steps."},
    )
    sigma_scale: str = field(
        default="absolute",
        metadata={
            "help": "'relative': sigma is in units of the root mean square of each row of a "
            "weight.",
            "choices": list(SCALES),
        },
    )
    num_perturbations: int = field(
        default=1, metadata={"help": "Draws of the noise per optimizer step, k in the paper, >= 1."}
    )
    two_sided: bool = field(
        default=True,
        metadata={
            "help": "Evaluate at W + U and at W - U, as the paper does; if false, at W + U alone "
            "(a control)."
        },
    )
    clean_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the gradient at W itself, lambda in the paper, in [0, 1]. The pass "
            "at W is only run above 0."
        },
    )
    distribution: str = field(
        default="normal",
        metadata={
            "help": f"Distribution of the noise, one of {', '.join(DISTRIBUTIONS)}; each has mean "
            "0 and deviation sigma.",
            "choices": list(DISTRIBUTIONS),
        },
    )
    sigma_schedule: str = field(
        default="constant",
        metadata={
            "help": "How sigma rises over training from ~0 to its value, one of "
            f"{', '.join(SIGMA_SCHEDULES)}.",
            "choices": list(SIGMA_SCHEDULES),
        },
    )
    sign: str = field(
        default="both",
        metadata={
            "help": "'both': each micro-batch is evaluated at W + U and W - U. 'alternate': the "
            "two signs are dealt to successive micro-batches and copies of the weights, one "
            "evaluation each, at the price of plain training.",
            "choices": ["both", "alternate"],
        },
    )
    start: float = field(
        default=0.0,
        metadata={
            "help": "Share of training before which it is plain, in [0, 1): a late start has most "
            "of the effect at part of the cost."
        },
    )
    interval: int = field(
        default=1,
        metadata={"help": "Use the method on every n-th optimizer step, plain training between."},
    )
    interval_scaling: bool = field(
        default=True,
        metadata={
            "help": "Multiply sigma by the square root of the interval, so that the mean penalty "
            "over steps stays what it is."
        },
    )
    common_random_numbers: bool = field(
        default=True,
        metadata={
            "help": "Use the same dropout masks (all random numbers) in every evaluation of a "
            "micro-batch, so that the odd terms in U cancel."
        },
    )
    log_sharpness: bool = field(
        default=False,
        metadata={
            "help": "Log nso/trace_estimate = [f(W+U) + f(W-U) - 2 f(W)]/sigma^2, an estimate of "
            "the trace of the Hessian, for one extra forward pass per logging step."
        },
    )

    def check_shared(self) -> None:
        """Raise a `ValueError` for an option out of its range."""
        check_choice("distribution", self.distribution, list(DISTRIBUTIONS))
        check_choice("sigma_scale", self.sigma_scale, list(SCALES))
        check_choice("sigma_schedule", self.sigma_schedule, list(SIGMA_SCHEDULES))
        check_choice("sign", self.sign, ["both", "alternate"])
        self._check_sigma()
        check_range("clean_weight", self.clean_weight, 0, 1, "The paper uses 0")
        check_range(
            "start", self.start, 0, 1, "0.8 leaves the last fifth of training to the method"
        )
        if self.start == 1:
            raise refusal("start", self.start, "all of training would be plain", "Try 0.8")
        check_integer("interval", self.interval, 1, "1 uses the method on every step")
        check_integer("num_perturbations", self.num_perturbations, 1, "The paper uses 1")

    def _check_sigma(self) -> None:
        if isinstance(self.sigma, str) and self.sigma != AUTO:
            try:
                self.sigma = float(self.sigma)  # of a flag
            except ValueError:
                rule = "neither a number nor 'auto'"
                cure = "Typical values are 0.005 to 0.02"
                raise refusal("sigma", self.sigma, rule, cure) from None
        check_rise("sigma_rise", self.sigma_rise)
        if self.sigma == AUTO:
            return
        sigma: Any = self.sigma
        check_range("sigma", sigma, 0, math.inf, "Typical values are 0.005 to 0.02")
        for option, default in (("sigma_rise", RISE), ("sigma_hold", False)):
            if (value := getattr(self, option)) != default:
                rule = f"sigma is {self.sigma}, and not found by its effect"
                raise refusal(option, value, rule, "Set sigma='auto', or leave it out")


Check = Callable[[str, Any, str], None]
"""Raises a `ValueError` for the option of this name, if its value is out of range; the last
argument is what to write instead."""


def option(default: Any, help: str, check: Check, typical: str) -> Any:
    """A field of a method's own options."""
    return field(default=default, metadata={"help": help, "check": check, "typical": typical})


def positive(name: str, value: Any, typical: str) -> None:
    """The check of numbers above 0."""
    check_positive(name, value, typical)


def between(low: float, high: float = math.inf) -> Check:
    """The check of numbers in a range, bounds included."""
    return lambda name, value, typical: check_range(name, value, low, high, typical)


def integer(low: int) -> Check:
    """The check of whole numbers from `low` on."""
    return lambda name, value, typical: check_integer(name, value, low, typical)


def boolean(name: str, value: Any, typical: str) -> None:
    """The check of true and false."""
    if not isinstance(value, bool):
        raise refusal(name, value, "must be true or false", typical)


@dataclass(frozen=True)
class Options:
    """A method's own options, which `method_kwargs` fills: none, unless it has a class of its own.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            each.metadata["check"](each.name, getattr(self, each.name), each.metadata["typical"])

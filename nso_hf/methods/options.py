"""The options that methods share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from nso_hf.refusal import check_choice, check_integer, check_range
from nso_hf.step.noise import DISTRIBUTIONS

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

    sigma: float = field(
        default=0.01,
        metadata={
            "help": "Standard deviation of the noise in each weight, >= 0. At 0 this is plain "
            "training."
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
        check_choice("sigma_schedule", self.sigma_schedule, list(SIGMA_SCHEDULES))
        check_choice("sign", self.sign, ["both", "alternate"])
        check_range("sigma", self.sigma, 0, math.inf, "Typical values are 0.005 to 0.02")
        check_range("clean_weight", self.clean_weight, 0, 1, "The paper uses 0")
        check_integer("num_perturbations", self.num_perturbations, 1, "The paper uses 1")


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none of its own."""

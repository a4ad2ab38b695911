"""The options of NSO: a dataclass that any TrainingArguments takes as a mixin."""

import dataclasses
import inspect
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from nso_hf.methods import METHODS
from nso_hf.methods.nso import SIGMA_SCHEDULES
from nso_hf.noise import DISTRIBUTIONS
from nso_hf.refusal import refusal


@dataclass
class NSOArguments:
    """The options of Noise Stability Optimization (arXiv 2306.08553), apart from those of training.

    Combine them with any training arguments: `class MyConfig(NSOArguments, SFTConfig)`.

    Raises:
        ValueError: an option is out of its range or does not go with another; the message names the
            option, its value, the rule and the cure.
    """

    method: str = field(
        default="nso",
        metadata={
            "help": f"The update rule, one of {', '.join(METHODS)}.",
            "choices": list(METHODS),
        },
    )
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
    perturb_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions searched for in the parameters' names: perturb only those "
            "that match one. Default: every trainable parameter."
        },
    )
    perturb_exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions searched for in the parameters' names: never perturb "
            "those that match one."
        },
    )
    perturb_min_ndim: int = field(
        default=1,
        metadata={
            "help": "Perturb only parameters of at least this many dimensions; 2 leaves out biases "
            "and gains, 0 includes single numbers such as a temperature."
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
    method_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of methods other than nso, a dict or JSON, as lr_scheduler_kwargs."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Makes `class MyConfig(NSOArguments, SFTConfig): pass` whole, with an __init__ that takes
        # both. A class that declares options of its own is decorated by its author, as ever: twice
        # would lose the options' metadata.
        if not inspect.get_annotations(cls):
            dataclass(cls)

    def __post_init__(self) -> None:
        if isinstance(self.method_kwargs, str):
            try:
                self.method_kwargs = json.loads(self.method_kwargs)
            except json.JSONDecodeError as error:
                rule, cure = f"not JSON ({error})", 'Write it as {"name": 0.1}'
                raise refusal("method_kwargs", self.method_kwargs, rule, cure) from error
        self.check()
        following = getattr(super(), "__post_init__", None)  # that of the training arguments
        if following is not None:
            following()
        if hasattr(self, "device") and self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns

    def check(self) -> None:
        """Raise a `ValueError` for an option out of range, or one that does not go with another."""
        _check_choice("method", self.method, list(METHODS))
        _check_choice("distribution", self.distribution, list(DISTRIBUTIONS))
        _check_choice("sigma_schedule", self.sigma_schedule, list(SIGMA_SCHEDULES))
        _check_choice("sign", self.sign, ["both", "alternate"])
        _check_range("sigma", self.sigma, 0, math.inf, "Typical values are 0.005 to 0.02")
        _check_range("clean_weight", self.clean_weight, 0, 1, "The paper uses 0")
        _check_integer("num_perturbations", self.num_perturbations, 1, "The paper uses 1")
        _check_integer("perturb_min_ndim", self.perturb_min_ndim, 0, "2 means matrices only")
        for option in ("perturb_include", "perturb_exclude"):
            _check_patterns(option, getattr(self, option))
        for option in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if hasattr(self, option):  # with training arguments, which leave it to the data loader
                _check_integer(option, getattr(self, option), 1, "Typical values are 8 to 128")
        self._check_method()

    def _check_method(self) -> None:
        method = METHODS[self.method]
        given = self.method_kwargs if self.method_kwargs is not None else {}
        if not isinstance(given, dict):
            cure = 'Write it as {"name": 0.1}'
            raise refusal("method_kwargs", given, "must be a dict of options", cure)
        for name in given:
            if name not in method.defaults:
                takes = f"takes {', '.join(method.defaults)}" if method.defaults else "takes none"
                rule = f"method {self.method!r} {takes}, not {name!r}"
                raise refusal("method_kwargs", given, rule, f"Remove {name!r}")
        for option in dataclasses.fields(NSOArguments):
            value = getattr(self, option.name)
            if option.name not in method.options | _OF_EVERY_METHOD and value != option.default:
                rule = f"method {self.method!r} does not read it"
                raise refusal(option.name, value, rule, "Remove it, or set method='nso'")
        method.check(self)


@dataclass
class NSOConfig(NSOArguments, TrainingArguments):
    """`TrainingArguments` with the options of NSO."""


@dataclass
class NSOSeq2SeqConfig(NSOArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the options of NSO."""


_OF_EVERY_METHOD = {
    "method",
    "method_kwargs",
    "perturb_include",
    "perturb_exclude",
    "perturb_min_ndim",
    "common_random_numbers",
}


def _check_choice(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise refusal(option, value, "unknown", f"Choose one of {', '.join(map(repr, choices))}")


def _check_range(option: str, value: float, low: float, high: float, hint: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and math.isfinite(value)):
        bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise refusal(option, value, f"must be a finite number, {bounds}", hint)


def _check_integer(option: str, value: int, low: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise refusal(option, value, f"must be an integer, at least {low}", hint)


def _check_patterns(option: str, patterns: list[str] | None) -> None:
    if patterns is None:
        return
    are_strings = not isinstance(patterns, str) and all(isinstance(p, str) for p in patterns)
    if not are_strings or not patterns:
        cure = "Write it as ['attn', 'mlp']"
        raise refusal(option, patterns, "must be a list of regular expressions", cure)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            rule = f"{pattern!r} is not a regular expression ({error})"
            cure = "Escape special characters with a backslash"
            raise refusal(option, patterns, rule, cure) from error

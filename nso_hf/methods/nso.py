r"""Noise Stability Optimization (Zhang, Li, Ju; TMLR 2024, arXiv 2306.08553, Algorithm 1).

Draw U_1 ... U_k ~ P with mean 0, E[U U'] = sigma^2 I, P symmetric. The gradient of a step is

    two-sided   g = lambda grad f(W) + (1-lambda)/(2k) sum_j [grad f(W + U_j) + grad f(W - U_j)]
    one-sided   g = lambda grad f(W) + (1-lambda)/k    sum_j  grad f(W + U_j)

whose expectation at lambda = 0 is the gradient of
E f(W + U) = f(W) + sigma^2/2 Tr Hessian(W) + O(sigma^4).
With sign="alternate", micro-batch m of the step (over all copies of the weights) has one
evaluation,

    g_m = grad f_m(W + (-1)^m U_j),    j = floor(m/2) mod k

and the same expectation, since U and -U are equally likely. With clean_weight it deals the
gradient at W, too (m-RWP, arXiv 2404.00357, is that with two_sided=False): even micro-batches are
at W, odd ones are displaced,

    g_m = 2 lambda grad f_m(W)                          m even
    g_m = 2 (1-lambda) grad f_m(W + (-1)^i U_j)         m = 2 i + 1, or + U_j if one-sided

with j = floor(i/2) mod k, or i mod k.

With sigma_scale="relative" E[U U'] = sigma^2 D^2: D is diagonal, and has for each weight the root
mean square of the weights in its row, at the W of the step. The expectation is then
f(W) + sigma^2/2 Tr(D Hessian(W) D) + O(sigma^4), with D as it is at W.

On every n-th step alone, sigma is multiplied by sqrt(n): the penalty, averaged over steps, stays
sigma^2/2 Tr Hessian.
"""

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from nso_hf.backends import Weight
from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import SIGMA_SCHEDULES
from nso_hf.refusal import refusal
from nso_hf.step import counter
from nso_hf.step.measurements import RISE
from nso_hf.step.noise import Noise
from nso_hf.step.rows import RowNoise


class NSO(Method):
    """The average gradient at W + U and W - U."""

    reads = frozenset(
        {
            "sigma",
            "num_perturbations",
            "two_sided",
            "clean_weight",
            "distribution",
            "sigma_scale",
            "sigma_rise",
            "sigma_hold",
            "sigma_schedule",
            "sign",
            "log_sharpness",
            "interval_scaling",
        }
    )

    def check(self) -> None:
        args = self.args
        if args.sign == "alternate":
            rule = "sign='alternate' has one evaluation per micro-batch, at W + U or at W - U"
            both = "or use sign='both'"
            if not args.two_sided and not args.clean_weight:
                cure = f"Set two_sided=True, or clean_weight above 0, {both}"
                raise refusal("two_sided", False, rule, cure)
            if args.log_sharpness:
                raise refusal("log_sharpness", True, rule, f"Set log_sharpness=False, {both}")
        if args.log_sharpness and not args.two_sided:
            rule = "[f(W+U) + f(W-U) - 2 f(W)]/sigma^2 needs both signs"
            raise refusal("log_sharpness", True, rule, "Set two_sided=True")
        if args.log_sharpness and not args.common_random_numbers:
            rule = "with dropout masks of their own, f(W+U) and f(W) are different functions"
            raise refusal("log_sharpness", True, rule, "Set common_random_numbers=True")
        if args.log_sharpness and (args.sigma == 0 or args.clean_weight == 1):
            rule = f"no noise is added at sigma={args.sigma}, clean_weight={args.clean_weight}"
            raise refusal("log_sharpness", True, rule, "Set sigma > 0 and clean_weight < 1")
        if args.sigma_hold:
            self._check_is_held()

    def _check_is_held(self) -> None:
        """The rise is that of both signs, at the sigma that is held."""
        wanted = {
            "sign": "both",
            "two_sided": True,
            "common_random_numbers": True,
            "sigma_schedule": "constant",
        }
        for option, value in wanted.items():
            if (given := getattr(self.args, option)) != value:
                rule = f"the rise is not measured with {option}={given!r}"
                cure = f"Set {option}={value!r}, or sigma_hold=False"
                raise refusal("sigma_hold", True, rule, cure)

    def check_micro_batches(self, accumulation: int, copies: int) -> None:
        signs, parts = 1 + self.args.two_sided, 1 + (self.args.clean_weight > 0)
        evaluations = parts * signs * self.args.num_perturbations
        if self.args.sign == "alternate" and accumulation * copies % evaluations:
            factors = " x ".join(
                [*["2"] * (parts == 2), *["2"] * (signs == 2), "num_perturbations"]
            )
            rule = (
                f"gradient_accumulation_steps ({accumulation}) x copies of the weights ({copies}: "
                "one per process, or one per group of processes that shard it) must be a multiple "
                f"of {factors} ({evaluations}), so that each evaluation meets as many micro-batches"
            )
            multiple = math.lcm(evaluations, copies) // copies
            cure = f"Set gradient_accumulation_steps to a multiple of {multiple}"
            raise refusal("sign", "alternate", rule, f"{cure}, or use sign='both'")

    def displaces(self) -> bool:
        return self.args.sigma != 0 and self.args.clean_weight < 1

    def parks(self, weights: Sequence[Weight]) -> bool:
        is_drawn_fast = any(counter.serves(weight.data.device.type) for weight in weights)
        return self.args.num_perturbations == 1 and not is_drawn_fast

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        lam, k = self.args.clean_weight, self.args.num_perturbations
        share = SIGMA_SCHEDULES[self.args.sigma_schedule](step.progress)
        n = self.args.interval if self.args.interval_scaling else 1
        sigma = share * math.sqrt(n) * step.sigma
        if sigma == 0 or lam == 1:
            return (yield Point(last=True))
        if step.is_measured:
            step.measurements["nso/sigma"] = sigma

        is_relative = self.args.sigma_scale == "relative"

        def U(j: int, sign: int = 1) -> Noise:
            drawn = (step.seed, step.number, j, sign * sigma, self.args.distribution)
            return RowNoise(*drawn, step.row_rms()) if is_relative else Noise(*drawn)

        if self.args.sign == "alternate":
            i, weight = step.micro_batch, 1.0
            if lam > 0:
                i, is_noisy = divmod(i, 2)
                weight = 2 * (1 - lam) if is_noisy else 2 * lam
                if not is_noisy:
                    return weight * (yield Point(weight=weight, last=True))
            pair, odd = divmod(i, 2) if self.args.two_sided else (i, 0)
            sign = -1 if odd else 1
            # -U is drawn as fast as U, where that is not to be kept.
            at = (U(pair % k), sign) if self.parks(step.weights) else (U(pair % k, sign), 1)
            return weight * (yield Point(*at, weight=weight, last=True))

        # While sigma is still small the differences of losses are rounding, divided by sigma^2.
        measures_trace = self.args.log_sharpness and step.is_measured and share >= 0.1
        measures_rise = self.args.sigma_hold and step.is_measured
        is_clean = lam > 0 or measures_trace or measures_rise
        clean = (yield Point(weight=lam)) if is_clean else None
        signs = (1, -1) if self.args.two_sided else (1,)
        evaluations = [(j, sign) for j in range(k) for sign in signs]
        losses = []
        for j, sign in evaluations:
            last = (j, sign) == evaluations[-1]
            losses.append((yield Point(U(j), sign, (1 - lam) / len(evaluations), last)))
        perturbed = sum(losses[1:], losses[0]) / len(losses)
        if clean is None:
            return perturbed
        if measures_rise:  # of the sigma that is held, by the square of which it grows
            step.measurements[RISE] = torch.stack([(perturbed - clean) / n, clean])
        if measures_trace:
            name = "nso/relative_trace_estimate" if is_relative else "nso/trace_estimate"
            step.measurements[name] = 2 * (perturbed - clean) / sigma**2
        return lam * clean + (1 - lam) * perturbed

"""Friendly SAM (Li et al.; CVPR 2024, arXiv 2403.12350): the ascent without the gradient that
batches have in common.

    m_t = lambda m_(t-1) + (1 - lambda) g1,    d = g1 - sigma m_t,    g1 = grad f(W)
    g = grad f(W + e),    e = rho d/||d||

g1 is of one micro-batch on one copy of the weights, as in SAM, and so is the m_t that it meets;
what is remembered of a step is their mean, the moving average of the step's own gradient.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, between, option, positive
from nso_hf.methods.sam import TINY
from nso_hf.step.direction import Direction


@dataclass(frozen=True)
class FSAMOptions(Options):
    rho: float = option(0.05, "Norm of the displacement, > 0.", positive, "Typical: 0.05 to 0.2")
    forget: float = option(
        1.0, "How much of the average is taken out, sigma, >= 0.", between(0), "Typical: 1"
    )
    decay: float = option(
        0.6, "Decay of the average, lambda, in [0, 1].", between(0, 1), "Typical: 0.6 to 0.95"
    )


class FSAM(Method):
    Options = FSAMOptions
    reads_gradients = True
    remembers = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho, sigma, lam = self.options.rho, self.options.forget, self.options.decay
        g1 = Direction()
        loss = yield Point(weight=0, into=g1)
        step.collect("average", g1)
        m = step.remembered("average")
        # g1 - sigma m_t, in the place of g1.
        d = g1.combine_(1 - sigma * (1 - lam), m, -sigma * lam)
        e = d * (rho / (step.norm(d) + TINY))
        yield Point(e, last=True)
        return loss

    def finish(self, step: Step) -> None:
        if step.acts:
            lam = self.options.decay
            step.remember("average", lam, step.collected("average"), 1 - lam)

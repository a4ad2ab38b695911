"""Curvature-Regularised SAM (Wu et al.; AAAI 2024, arXiv 2312.13555): a normalised trace of the
Hessian as a penalty, by finite differences.

    g = g+ + gamma (g+ + g- - 2 g0) + beta (g+ - g-),    e = rho g0/||g0||

with g0, g+ and g- the gradients at W, W + e and W - e, of one micro-batch as in SAM.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, between, option, positive
from nso_hf.methods.sam import TINY
from nso_hf.step.direction import Direction


@dataclass(frozen=True)
class CRSAMOptions(Options):
    rho: float = option(0.1, "Norm of the displacement, > 0.", positive, "Typical: 0.1")
    gamma: float = option(0.1, "Weight of the second difference, >= 0.", between(0), "Typical: 0.1")
    beta: float = option(0.01, "Weight of the first difference, >= 0.", between(0), "Typical: 0.01")


class CRSAM(Method):
    Options = CRSAMOptions
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho, gamma, beta = self.options.rho, self.options.gamma, self.options.beta
        g0 = Direction()
        loss = yield Point(weight=-2 * gamma, into=g0)
        e = g0 * (rho / (step.norm(g0) + TINY))
        if gamma != beta:
            yield Point(e, sign=-1, weight=gamma - beta)
        yield Point(e, weight=1 + gamma + beta, last=True)
        return loss

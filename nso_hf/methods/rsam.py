"""Random SAM (Liu et al.; NeurIPS 2022): the ascent is taken from a randomly smoothed point.

    u = sigma ||row of W|| z,  z ~ N(0, I);    g1 = grad f(W + u)
    g = grad f(W + e),    e = rho g1/(lambda ||g1|| + ||u||)

z is drawn once per optimizer step, g1 is of one micro-batch's mean loss, as in SAM.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, between, option, positive
from nso_hf.methods.sam import TINY
from nso_hf.step.direction import Direction
from nso_hf.step.rows import RowFactors, RowNoise, row_norms


@dataclass(frozen=True)
class RSAMOptions(Options):
    rho: float = option(0.05, "Scale of the displacement, > 0.", positive, "Typical: 0.05")
    filter_sigma: float = option(
        0.01, "Noise over the norm of a row, sigma, > 0.", positive, "Typical: 0.01"
    )
    clean_weight: float = option(
        1.0, "Weight of the gradient's norm, lambda, >= 0.", between(0), "Typical: 1"
    )


class RSAM(Method):
    Options = RSAMOptions
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho, sigma, lam = self.options.rho, self.options.filter_sigma, self.options.clean_weight
        norms = row_norms(step.weights, step.backend)
        rows = RowFactors((w.index, norm) for w, norm in zip(step.weights, norms, strict=True))
        u = Direction.of(RowNoise(step.seed, step.number, 0, sigma, rows=rows), step.weights)
        g1 = Direction()
        yield Point(u, weight=0, into=g1)
        e = g1 * (rho / (lam * step.norm(g1) + step.norm(u) + TINY))
        del u
        loss: Tensor = yield Point(e, last=True)
        return loss

"""Sharpness-Aware Minimization (Foret et al.; ICLR 2021, arXiv 2010.01412, equations 2 and 3).

    g = grad f(W + e),    e = rho g1/||g1||,    g1 = grad f(W)

the norm over all perturbed weights. Both gradients are of one micro-batch on one copy of the
weights (the paper's m-sharpness), so that accumulation steps and replicas count alike.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.step.direction import Direction

TINY = 1e-12
"""Added to norms, so that a gradient of zero is no displacement."""


@dataclass(frozen=True)
class SAMOptions(Options):
    rho: float = option(0.05, "Norm of the displacement, > 0.", positive, "Typical: 0.01 to 0.05")


class SAM(Method):
    Options = SAMOptions
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho = self.options.rho
        g1 = Direction()
        loss = yield Point(weight=0, into=g1)
        e = g1 * (rho / (step.norm(g1) + TINY))
        yield Point(e, last=True)
        return loss

"""SAM without normalisation (Andriushchenko, Flammarion; ICML 2022, arXiv 2206.06232).

    g = grad f(W + e),    e = rho g1,    g1 = grad f(W)

with g1 of one micro-batch's mean loss, as in SAM.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.step.direction import Direction


@dataclass(frozen=True)
class USAMOptions(Options):
    rho: float = option(0.05, "The displacement over the gradient, > 0.", positive, "Typical: 0.05")


class USAM(Method):
    Options = USAMOptions
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        g1 = Direction()
        loss = yield Point(weight=0, into=g1)
        yield Point(g1 * self.options.rho, last=True)
        return loss

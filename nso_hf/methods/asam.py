"""Adaptive SAM (Kwon et al.; ICML 2021, arXiv 2102.11600, equation 10).

    g = grad f(W + e),    e = rho T^2 g1/||T g1||,    T = |W|,    g1 = grad f(W)

element by element: to scale a layer up and the next one down changes nothing. The authors' code
adds a small constant to T.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.methods.sam import TINY
from nso_hf.step.direction import Direction


@dataclass(frozen=True)
class ASAMOptions(Options):
    rho: float = option(
        0.5, "Norm of the displacement relative to the weights, > 0.", positive, "Typical: 0.5 to 2"
    )


class ASAM(Method):
    Options = ASAMOptions
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho = self.options.rho
        g1 = Direction()
        loss = yield Point(weight=0, into=g1)
        T = [weight.data.abs() for weight in step.weights]
        Tg = g1.multiply_(T)
        scale = rho / (step.norm(Tg) + TINY)
        e = Tg.multiply_(T) * scale
        del T
        yield Point(e, last=True)
        return loss

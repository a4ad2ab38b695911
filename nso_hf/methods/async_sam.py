"""Asynchronous SAM (arXiv 2503.11147): the ascent along the gradient of the step before.

    g_t = grad f(W + e),    e = rho g_(t-1)/||g_(t-1)||

with g_(t-1) the whole step's gradient as it came, before clipping; the first step is plain.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.methods.sam import TINY


@dataclass(frozen=True)
class AsyncSAMOptions(Options):
    rho: float = option(0.05, "Norm of the displacement, > 0.", positive, "Typical: 0.01 to 0.1")


class AsyncSAM(Method):
    Options = AsyncSAMOptions
    reads_gradients = True
    remembers = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho = self.options.rho
        previous = step.remembered("previous")
        e = previous * (rho / (step.norm(previous) + TINY))
        return (yield Point(e, last=True))

    def finish(self, step: Step) -> None:
        step.remember("previous", 0, step.gradient(), 1)

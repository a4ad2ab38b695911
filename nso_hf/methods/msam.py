"""Momentum-SAM (Becker, Altrock, Risse; arXiv 2401.12033, algorithm 1): SAM at the price of plain
training, the optimizer's momentum in place of the gradient.

    g = grad f(W + e),    e = -rho v/||v||

with v the momentum buffer (the first moment of Adam) before this step: the point that the
optimizer is moving to, not the one it comes from. The authors' code applies the weight decay at
W + e, this one at W.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from nso_hf.backends import without_moments
from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.methods.sam import TINY


@dataclass(frozen=True)
class MSAMOptions(Options):
    rho: float = option(0.3, "Norm of the displacement, > 0.", positive, "Typical: 0.05 to 0.5")


class MSAM(Method):
    Options = MSAMOptions
    reads_gradients = True

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if any(group.get("momentum", None) == 0 for group in optimizer.param_groups):
            raise without_moments(optimizer)

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho = self.options.rho
        v = step.first_moment()
        e = v * (-rho / (step.norm(v) + TINY))
        return (yield Point(e, last=True))

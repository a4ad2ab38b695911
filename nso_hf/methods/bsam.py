"""Bayesian SAM (Moellenhoff, Khan; ICLR 2023, arXiv 2210.01620, algorithm 1): SAM as a relaxation
of variational inference, with a precision s for each weight.

    g1 = grad f(W + z),        z ~ N(0, 1/(N s))
    g2 = grad f(W + rho g1/s)
    m = beta1 m + (1 - beta1) (g2 + delta W)
    s = beta2 s + (1 - beta2) (sqrt(s) |g1| + delta + gamma)
    W = W - lr m/s

element by element, from m = 0 and s = 1. The optimizer is given m/s, so it has to be SGD without
momentum. g1, and its magnitude, are of one micro-batch as in SAM; z is that of all of them. The
authors' code divides by the s before.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, between, integer, option, positive
from nso_hf.refusal import refusal
from nso_hf.step.direction import Direction
from nso_hf.step.noise import Noise


@dataclass(frozen=True)
class BSAMOptions(Options):
    rho: float = option(0.05, "Scale of the displacement, > 0.", positive, "Typical: 0.01 to 0.1")
    num_examples: int = option(
        None, "Number of training examples, N, >= 1.", integer(1), "Set it: the size of the data"
    )
    damping: float = option(0.1, "gamma, >= 0.", between(0), "Typical: 0.1")
    beta1: float = option(0.9, "Decay of the momentum, in [0, 1].", between(0, 1), "Typical: 0.9")
    beta2: float = option(
        0.999, "Decay of the precision, in [0, 1].", between(0, 1), "Typical: 0.999"
    )
    weight_decay: float = option(
        1e-4, "Precision of the prior, delta, >= 0.", between(0), "Typical: 0.0001 to 0.001"
    )


class BSAM(Method):
    Options = BSAMOptions
    reads_gradients = True
    remembers = True

    def check_optimizer(self, optimizer: Optimizer) -> None:
        momentum = any(group.get("momentum") for group in optimizer.param_groups)
        if not isinstance(optimizer, SGD) or momentum:
            rule = "bsam has its own momentum and precision, and hands over m/s to be stepped along"
            cure = "Set optim='sgd', without momentum"
            raise refusal("optim", type(optimizer).__name__, rule, cure)

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        rho, N = self.options.rho, self.options.num_examples
        s = step.remembered("precision", first=1.0)
        z = Direction.of(Noise(step.seed, step.number, 0, 1.0), step.weights)
        z.multiply_([(N * each).rsqrt() for each in s.parts])
        g1 = Direction()
        yield Point(z, weight=0, into=g1)
        del z
        step.collect("magnitude", Direction(list(torch._foreach_abs(g1.parts))))
        e = g1.multiply_(torch._foreach_reciprocal(s.parts)) * rho
        return (yield Point(e, last=True))

    def finish(self, step: Step) -> None:
        if not step.acts:
            return
        beta1, beta2 = self.options.beta1, self.options.beta2
        delta, gamma = self.options.weight_decay, self.options.damping
        g2, magnitude = step.gradient(), step.collected("magnitude")
        decayed = [
            g * g2.scale + delta * weight.data
            for g, weight in zip(g2.parts, step.weights, strict=True)
        ]
        step.remember("momentum", beta1, Direction(decayed), 1 - beta1)
        m, s = step.remembered("momentum"), step.remembered("precision", first=1.0)
        grown = [
            root.sqrt() * g1 + delta + gamma
            for root, g1 in zip(s.parts, magnitude.parts, strict=True)
        ]
        step.remember("precision", beta2, Direction(grown), 1 - beta2)
        for g, mean, precision in zip(g2.parts, m.parts, s.parts, strict=True):
            # What is not finite stays so: the step is skipped.
            g.mul_(0).add_(mean / precision * step.loss_scale)

"""HERO (Yang et al.; DAC 2022, arXiv 2111.11986): flat for generalisation and for quantisation.

    e = h W^2 g0/|| |W| g0 ||,    g0 = grad f(W),    g1 = grad f(W + e)
    g = g1 + lambda grad R,    R = sum over weight matrices of mean (g1 - g0)^2

with g0 held fixed. The gradient of R needs a product of the Hessian with r = dR/dg1
= 2 (g1 - g0)/numel, which is one more gradient,

    grad R = [grad f(W + e + tau r) - g1]/tau,    ||tau r|| = 0.001

to first order in tau (within 1 % on a small model); with `exact`, on one process, R is
differentiated twice instead.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from nso_hf.backends import Backend
from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, between, boolean, option, positive
from nso_hf.methods.sam import TINY
from nso_hf.refusal import refusal
from nso_hf.step.direction import Direction

_STEP = 0.001  # ||tau r||


@dataclass(frozen=True)
class HEROOptions(Options):
    h: float = option(
        0.01, "Norm of the displacement relative to the weights, > 0.", positive, "Typical: 0.01"
    )
    strength: float = option(
        1.0, "Weight of the difference of gradients, lambda, >= 0.", between(0), "Typical: 1"
    )
    exact: bool = option(
        False, "Differentiate twice, on one process.", boolean, "Use true or false"
    )


class HERO(Method):
    Options = HEROOptions
    reads_gradients = True

    def check_backend(self, backend: Backend) -> None:
        if self.options.exact and backend.num_processes > 1:
            rule = "gradients are differentiated twice on one process alone"
            raise refusal("method_kwargs.exact", True, rule, "Leave it out")

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        h, lam = self.options.h, self.options.strength
        g0 = Direction()
        loss = yield Point(weight=0, into=g0)
        T = [weight.data.abs() for weight in step.weights]
        Tg = Direction(list(torch._foreach_mul(g0.parts, T)))
        scale = h / (step.norm(Tg) + TINY)
        e = Tg.multiply_(T) * scale
        del T
        if self.options.exact:
            yield Point(e, last=True, penalty=lambda loss: lam * _difference(loss, g0, step))
            return loss

        g1, r = Direction(), Direction()
        c = 0.0

        def remainder() -> float:
            nonlocal c
            r.parts = [
                (after * g1.scale - before) * (2 / weight.numel * (len(weight.shape) > 1))
                for after, before, weight in zip(g1.parts, g0.parts, step.weights, strict=True)
            ]
            length: float = step.norm(r).item()
            c = float(max(lam * length / _STEP, TINY))  # lambda/tau
            return 1 - c

        yield Point(e, weight=remainder, into=g1)
        yield Point(r.combine_(lam / c, e, 1), weight=c, last=True)
        return loss


def _difference(loss: Tensor, g0: Direction, step: Step) -> Tensor:
    """R, of a micro-batch's share of the step's loss."""
    matrices = [
        (weight.parameter, before)
        for weight, before in zip(step.weights, g0.parts, strict=True)
        if len(weight.shape) > 1
    ]
    parameters = [parameter for parameter, _ in matrices]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    M = step.micro_batches
    squares = [
        (M * g1 - before).square().mean()
        for g1, (_, before) in zip(gradients, matrices, strict=True)
    ]
    return torch.stack(squares).sum() / M

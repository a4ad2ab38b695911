"""Zeroth-order two-point estimate (MeZO, arXiv 2305.17333; flat minima by it, arXiv 2506.05454).

    g = 1/k sum_j [f(W + mu z_j) - f(W - mu z_j)]/(2 mu) z_j,    z_j ~ N(0, I)

whose expectation is the gradient of E f(W + mu z). Two forward passes a draw in evaluation mode, no
backward pass and no activations kept. The z_j are those of all micro-batches and replicas.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, option, positive
from nso_hf.step.noise import Noise


@dataclass(frozen=True)
class ZOOptions(Options):
    mu: float = option(
        1e-3, "Standard deviation of the displacement, > 0.", positive, "Typical: 0.001 to 0.002"
    )


class ZO(Method):
    Options = ZOOptions
    reads = frozenset({"num_perturbations"})
    reads_gradients = True

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        mu, k = self.options.mu, self.args.num_perturbations
        slopes, losses = [], []
        for j in range(k):
            z = Noise(step.seed, step.number, j, mu)
            above = yield Point(z, weight=0, forward_only=True)
            below = yield Point(z, sign=-1, weight=0, forward_only=True, last=j == k - 1)
            slopes.append((above - below) / (2 * mu))
            losses += [above, below]
        for j, slope in enumerate(step.backend.mean(torch.stack(slopes)).tolist()):
            step.add_to_gradient(Noise(step.seed, step.number, j, slope / k))
        return torch.stack(losses).mean()

"""The complexity of representations of the task to come, as a term of the loss of pretraining."""

import torch
from torch import Tensor


def representation_regularization(
    representations: Tensor,
    *,
    num_draws: int,
    radius: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The empirical Rademacher complexity of linear heads ||v|| <= R on h (arXiv 2403.06871), whose
    supremum has a closed form:

        E_s [ sup_v (1/n) sum_i s_i <v, h(x_i)> ]  =  R E_s || (1/n) sum_i s_i h(x_i) ||,

    s_i = +-1 with equal probability. It needs no label. Without the norms of h changing it falls as
    1 / sqrt(n), n being the number of inputs given here.

    Args:
        representations: h(x_1) ... h(x_n), (n, d).
        num_draws: of s, over which E_s is averaged: an unbiased estimate.
        radius: R.
        generator: of s; the global one of the representations' device by default.

    Returns:
        A scalar in float32 (float64 for float64), with gradient; where the sum is 0, that is 0.
    """
    h = representations if representations.dtype == torch.float64 else representations.float()
    device = h.device if generator is None else generator.device
    signs = torch.randint(0, 2, (num_draws, len(h), 1), generator=generator, device=device)
    s = 2 * signs.to(h) - 1
    # No matrix product, which would be in half precision under autocast.
    norms: Tensor = torch.linalg.vector_norm((s * h).mean(dim=1), dim=1)
    return radius * norms.mean()

"""The regularization of representations: against all signs, and in a training."""

from itertools import product

import pytest
import torch

from nso_hf.tasks.images.rademacher import representation_regularization


def enumerated(h, radius):
    """R E_s || (1/n) sum_i s_i h_i ||, over all 2^n signs, in plain loops."""
    n, norms = len(h), []
    for s in product([-1.0, 1.0], repeat=n):
        total = sum(sign * row for sign, row in zip(s, h, strict=True)) / n
        norms.append(total.square().sum().sqrt())
    return radius * sum(norms) / len(norms)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_expectation_is_that_over_all_signs(n):
    h = torch.randn(n, 3, dtype=torch.float64)
    draws = 40_000
    found = representation_regularization(h, num_draws=draws, radius=2.0)
    # A norm is at most R max ||h_i||: so is the spread, and 5 standard errors are never left.
    error = 5 * 2.0 * h.norm(dim=1).max().item() / draws**0.5
    assert found.item() == pytest.approx(enumerated(h, 2.0).item(), abs=error)
    if n == 1:  # no sign matters
        assert found.item() == pytest.approx(2 * h.norm().item(), rel=1e-12)


def test_the_gradient_is_that_of_a_plain_loop():
    """With the signs that this generator draws; in float64, summed in another order."""
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    found = representation_regularization(
        h, num_draws=3, radius=0.5, generator=torch.Generator().manual_seed(1)
    )
    (gradient,) = torch.autograd.grad(found, h)
    drawn = torch.randint(0, 2, (3, 6, 1), generator=torch.Generator().manual_seed(1))
    value, expected = 0.0, torch.zeros_like(h)
    for s in (2.0 * drawn[..., 0] - 1).double():
        total = sum(s[i] * h[i] for i in range(6)).detach() / 6
        norm = total.square().sum().sqrt()
        value += 0.5 * norm / 3
        for i in range(6):
            expected[i] += 0.5 * s[i] * total / norm / 6 / 3
    assert found.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_at_zero_is_zero():
    for h in (torch.zeros(4, 3), torch.tensor([[1.0, 2.0], [1.0, 2.0]])):  # half the signs cancel
        h.requires_grad_()
        representation_regularization(h, num_draws=64, radius=1.0).backward()
        assert h.grad.isfinite().all()
    assert representation_regularization(torch.zeros(4, 3), num_draws=2, radius=1.0) == 0


def test_it_shrinks_with_the_number_of_inputs():
    """For orthonormal h it is exactly R / sqrt(n)."""
    for n in (4, 16, 64):
        found = representation_regularization(torch.eye(n), num_draws=5, radius=3.0)
        assert found.item() == pytest.approx(3 / n**0.5, rel=1e-6)  # rounding in float32


def test_half_precision_is_summed_in_float32():
    h = torch.randn(64, 8).bfloat16()
    seed = torch.Generator().manual_seed(0)
    options = {"num_draws": 4, "radius": 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        found = representation_regularization(h, generator=seed, **options)
    assert found.dtype == torch.float32
    exact = representation_regularization(
        h.double(), generator=torch.Generator().manual_seed(0), **options
    )
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)

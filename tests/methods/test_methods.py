"""Neighbouring methods written against the same engine, in a few lines each, compared with
plain-PyTorch loops.

They show that a method is its formula and one entry of the table: no line of the trainer knows
them.
"""

import contextlib
from dataclasses import dataclass, field, make_dataclass

import pytest
import torch
from torch.optim import SGD

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.methods import METHODS, Method, Point
from nso_hf.step.noise import Noise
from tests.reference import (
    causal_loss_sum,
    config,
    draw,
    largest_difference,
    tiny_llama,
    token_data,
)


@dataclass(eq=False)
class Along:
    """Displacement by given tensors."""

    directions: list[torch.Tensor] = field(default_factory=list)

    def add_to(self, weights):
        for weight, direction in zip(weights, self.directions, strict=True):
            weight.data.add_(direction)


@contextlib.contextmanager
def gradients_apart(weights, into):
    """Gradients of the passes inside end up in `into`, not in `.grad`."""
    kept = [weight.parameter.grad for weight in weights]
    for weight in weights:
        weight.parameter.grad = None
    try:
        yield
    finally:
        into.extend(weight.parameter.grad for weight in weights)
        for weight, gradient in zip(weights, kept, strict=True):
            weight.parameter.grad = gradient


class SAM(Method):
    """g(W + rho g(W)/||g(W)||), Foret et al."""

    Options = make_dataclass("Options", [("rho", float, 0.05)], frozen=True)

    def points(self, step):
        rho = self.options.rho
        ascent = []
        with gradients_apart(step.weights, ascent):
            loss = yield Point()
        norm = torch.stack([g.norm() for g in ascent]).norm()
        yield Point(Along([rho * g / (norm + 1e-12) for g in ascent]), last=True)
        return loss


class CRSAM(Method):
    """gp + gamma (gp + gm - 2 g0) + beta (gp - gm), arXiv 2312.13555."""

    def points(self, step):
        rho, gamma, beta = 0.1, 0.1, 0.01
        g0 = []
        with gradients_apart(step.weights, g0):
            yield Point()
        norm = torch.stack([g.norm() for g in g0]).norm()
        e = Along([rho * g / (norm + 1e-12) for g in g0])
        loss = yield Point(e, weight=1 + gamma + beta)
        yield Point(e, sign=-1, weight=gamma - beta)
        yield Point(weight=-2 * gamma, last=True)
        return loss


class TwoPoint(Method):
    """Zeroth order: (f(W + mu z) - f(W - mu z))/(2 mu) z, arXiv 2506.05454."""

    Options = make_dataclass("Options", [("mu", float, 1e-3)], frozen=True)

    def points(self, step):
        mu = self.options.mu
        z = Noise(step.seed, step.number, 0, mu)
        above = yield Point(z, weight=0)
        below = yield Point(z, sign=-1, weight=0, last=True)
        scale = (above - below).item() / (2 * mu) / mu
        for weight in step.weights:
            weight.parameter.grad = torch.zeros_like(weight.data)
        gradients = [
            type(weight)(
                weight.name, weight.index, weight.parameter, weight.parameter.grad, 0, weight.shape
            )
            for weight in step.weights
        ]
        z.add_to(gradients)
        for weight in step.weights:
            weight.parameter.grad.mul_(scale)
        return (above + below) / 2


@pytest.fixture(autouse=True)
def more_methods(monkeypatch):
    for name, method in {"sam": SAM, "cr-sam": CRSAM, "two-point": TwoPoint}.items():
        monkeypatch.setitem(METHODS, name, method)


def gradient(model, W, displacement, batch):
    for p, w, u in zip(model.parameters(), W, displacement, strict=True):
        p.data = w + u
    model.zero_grad()
    loss = causal_loss_sum(model, batch) / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    for p, w in zip(model.parameters(), W, strict=True):
        p.data = w
    return [p.grad.clone() for p in model.parameters()], loss.item()


def formula(name, model, W, batch, step):
    zero = [torch.zeros_like(w) for w in W]
    if name == "two-point":
        z = [u / 1e-2 for u in draw(model, 42, step, 0, 1e-2, "normal")]
        _, above = gradient(model, W, [1e-2 * u for u in z], batch)
        _, below = gradient(model, W, [-1e-2 * u for u in z], batch)
        return [(above - below) / 2e-2 * u for u in z]
    g0, _ = gradient(model, W, zero, batch)
    norm = torch.stack([g.norm() for g in g0]).norm() + 1e-12
    rho = {"sam": 0.2, "cr-sam": 0.1}[name]
    gp, _ = gradient(model, W, [rho * g / norm for g in g0], batch)
    if name == "sam":
        return gp
    gm, _ = gradient(model, W, [-rho * g / norm for g in g0], batch)
    return [p + 0.1 * (p + m - 2 * g) + 0.01 * (p - m) for p, m, g in zip(gp, gm, g0, strict=True)]


KWARGS = {"sam": {"rho": 0.2}, "cr-sam": None, "two-point": {"mu": 1e-2}}


@pytest.mark.parametrize(
    ("name", "lr", "tolerance"),
    # Two-point: losses of ~4 in float32 (5e-7) over 2 mu, times z (up to 4) and lr, in 3 steps.
    [("sam", 1.0, 1e-6), ("cr-sam", 1.0, 2e-6), ("two-point", 1e-2, 5e-5)],
)
def test_a_method_is_its_formula(tmp_path, name, lr, tolerance):
    data = token_data(24)
    reference = tiny_llama()
    for step in range(3):
        batch = {k: torch.stack([e[k] for e in data[8 * step : 8 * step + 8]]) for k in data[0]}
        W = [p.detach().clone() for p in reference.parameters()]
        g = formula(name, reference, W, batch, step)
        for p, w, d in zip(reference.parameters(), W, g, strict=True):
            p.data = w - lr * d
    model = tiny_llama()
    args = config(
        tmp_path,
        method=name,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        method_kwargs=KWARGS[name],
    )
    optimizers = (SGD(model.parameters(), lr=lr), None)
    NSOTrainer(model=model, args=args, train_dataset=data, optimizers=optimizers).train()
    assert largest_difference(model, reference) <= tolerance
    assert largest_difference(model, tiny_llama()) > 100 * tolerance


def test_a_method_takes_its_own_options_alone(tmp_path):
    NSOConfig(str(tmp_path), method="sam", method_kwargs='{"rho": 0.1}')
    with pytest.raises(ValueError, match=r"sigma=0\.1: method 'sam' does not read it"):
        NSOConfig(str(tmp_path), method="sam", sigma=0.1)
    with pytest.raises(ValueError, match="method 'sam' takes rho, not 'sigma'"):
        NSOConfig(str(tmp_path), method="sam", method_kwargs={"sigma": 1})
    with pytest.raises(ValueError, match="method 'nso' takes none, not 'rho'"):
        NSOConfig(str(tmp_path), method_kwargs={"rho": 1})

"""Losses whose perturbed gradient is known on paper."""

import math

import pytest
import torch
from torch import nn

from nso_hf import NSOTrainer
from nso_hf.step.noise import DISTRIBUTIONS
from tests.reference import DEVICE, config


class Elementwise(nn.Module):
    """Loss sum f(w) over a vector of weights; the inputs are ignored."""

    def __init__(self, f, w):
        super().__init__()
        self.f, self.w = f, nn.Parameter(w.to(DEVICE, copy=True))

    def forward(self, x, labels=None):
        return {"loss": self.f(self.w).sum()}


DATA = [{"x": torch.zeros(1), "labels": torch.zeros(1)}] * 4


def trained(tmp_path, model, lr=1.0, **options):
    args = config(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trainer = NSOTrainer(model=model, args=args, train_dataset=DATA, optimizers=(optimizer, None))
    trainer.train()
    return trainer


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0, 10.0])
def test_two_sided_is_plain_training_on_a_quadratic(tmp_path, sigma):
    # f = w^2/2: grad f(w+u) + grad f(w-u) = 2w whatever u; rounding is that of w+u, relative to
    # sigma.
    w = torch.linspace(-2, 2, 1000, device=DEVICE)
    model = Elementwise(lambda w: w**2 / 2, w)
    trained(tmp_path, model, lr=0.1, sigma=sigma, max_steps=3)
    torch.testing.assert_close(model.w.data, w * 0.9**3, rtol=0, atol=1e-6 * max(1.0, sigma))
    one_sided = Elementwise(lambda w: w**2 / 2, w)
    trained(tmp_path, one_sided, lr=0.1, sigma=sigma, max_steps=3, two_sided=False)
    assert (one_sided.w.data - w * 0.9**3).abs().max() >= 0.1 * sigma


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sign", ["both", "alternate"])
def test_gradient_of_fourth_powers_shifts_by_12_w_sigma_squared(tmp_path, distribution, sign):
    # (4 (w+u)^3 + 4 (w-u)^3)/2 = 4 w^3 + 12 w u^2, of mean 4 w^3 + 12 w sigma^2, over n weights at
    # the same w = 1.
    n, sigma, lr = 400_000, 0.1, 1e-3
    model = Elementwise(lambda w: w**4, torch.ones(n))
    accumulation = 2 if sign == "alternate" else 1
    trained(
        tmp_path,
        model,
        lr=lr,
        sigma=sigma,
        max_steps=1,
        distribution=distribution,
        sign=sign,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    gradient = (1 - model.w.data.double()) / lr
    shift = (gradient - 4).mean().item()
    # Standard error of the mean of 12 u^2: Var u^2 = (kurtosis - 1) sigma^4; rounding of w (6e-8)
    # by 1/lr.
    kurtosis = {"normal": 3.0, "uniform": 1.8, "laplace": 6.0, "rademacher": 1.0}[distribution]
    error = 12 * sigma**2 * math.sqrt((kurtosis - 1) / n) + 6e-8 / lr / math.sqrt(n)
    assert shift == pytest.approx(12 * sigma**2, abs=4 * error + 1e-5)


def test_logged_trace_estimate_is_the_trace(tmp_path):
    # f = sum a w^2/2 has Hessian diag(a): [f(W+U) + f(W-U) - 2 f(W)]/sigma^2 = sum a u^2/sigma^2,
    # of mean sum a.
    a = torch.linspace(0, 2, 2000, device=DEVICE)
    model = Elementwise(lambda w: a * w**2 / 2, torch.ones(2000))
    trainer = trained(
        tmp_path, model, lr=0.0, sigma=0.1, log_sharpness=True, distribution="rademacher"
    )
    estimates = [
        entry["nso/trace_estimate"] for entry in trainer.state.log_history if "loss" in entry
    ]
    # u^2 = sigma^2 exactly; f ~ 1000 in float32 (ulp 6e-5), three evaluations over sigma^2 = 0.01.
    assert estimates == pytest.approx([a.sum().item()] * 3, abs=0.05)
    for options in ({"clean_weight": 0.5}, {"num_perturbations": 3}):
        model = Elementwise(lambda w: a * w**2 / 2, torch.ones(2000))
        trainer = trained(tmp_path, model, lr=0.0, sigma=0.1, log_sharpness=True, **options)
        estimate = trainer.state.log_history[0]["nso/trace_estimate"]
        error = math.sqrt(2 * (a**2).sum().item() / options.get("num_perturbations", 1))
        assert estimate == pytest.approx(a.sum().item(), abs=4 * error)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1]),
        ("cosine", [(1 - math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 0.75, 1)]),
        ("exponential", [(math.e ** (5 * p) - 1) / (math.e**5 - 1) for p in (0.25, 0.5, 0.75, 1)]),
    ],
)
def test_schedules_of_sigma(tmp_path, schedule, shares):
    model = Elementwise(lambda w: w**2, torch.ones(10_000))
    trainer = trained(tmp_path, model, sigma=0.2, sigma_schedule=schedule, max_steps=4, lr=0.0)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["nso/sigma"] for entry in logs] == pytest.approx(
        [0.2 * share for share in shares]
    )
    norms = [0.2 * share * math.sqrt(10_000) for share in shares]
    assert [entry["nso/perturbation_norm"] for entry in logs] == pytest.approx(norms, rel=0.03)


def test_no_trace_estimate_while_sigma_is_far_from_its_value(tmp_path):
    model = Elementwise(lambda w: w**2, torch.ones(100))
    trainer = trained(
        tmp_path,
        model,
        lr=0.0,
        max_steps=20,
        sigma=0.1,
        sigma_schedule="linear",
        log_sharpness=True,
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["nso/trace_estimate" in e for e in logs] == [e["step"] >= 2 for e in logs]
    # H = 2 I, u'Hu/sigma^2 = 200 +- 28 for normal u; losses of 100 (ulp 8e-6) over sigma^2 >= 1e-4.
    assert all(abs(e["nso/trace_estimate"] - 200) < 150 for e in logs[1:])


def test_the_norm_is_measured_once_between_logs(tmp_path, monkeypatch):
    from nso_hf.step.perturbation import Perturbation

    calls = []
    original = Perturbation.measure
    monkeypatch.setattr(Perturbation, "measure", lambda self: calls.append(1) or original(self))
    model = Elementwise(lambda w: w**2, torch.ones(100))
    trained(
        tmp_path,
        model,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
    )
    assert len(calls) == 2

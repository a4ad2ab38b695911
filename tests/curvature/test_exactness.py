"""Every estimator against matrices: within three of its standard errors, eigenvalues to 1e-4."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nso_hf.curvature import (
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
    noise_stability,
    pac_bayes_bound,
)
from tests.curvature.dense import MODELS, Quadratic, dense, dense_hessian, gradient, made

every_model = pytest.mark.parametrize("name", list(MODELS))
both_ways = pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])


def within(estimate, stderr, exact, errors=3.0):
    return abs(estimate - exact) <= errors * stderr


@every_model
def test_the_matrices_are_those_of_second_differences(name):
    """Against first derivatives alone: [g(W + h v) - g(W - h v)]/(2h), h^2 of truncation. Softmax
    is in float32 even here: 6e-8 of rounding over h."""
    (model, batches), H = made(name), dense(name)
    scale, h = H.abs().max(), 1e-3
    assert (H - H.T).abs().max() <= 1e-6 * scale
    for _ in range(5):
        v = torch.randn(len(H), dtype=torch.float64)
        v /= v.norm()
        parts = v.split([p.numel() for p in model.parameters()])
        ends = []
        for step in (h, -2 * h, h):
            for parameter, part in zip(model.parameters(), parts, strict=True):
                parameter.data += step * part.view(parameter.shape)
            ends.append(gradient(model, batches))
        difference = (ends[0] - ends[1]) / (2 * h)
        assert (difference - H @ v).abs().max() <= 1e-3 * scale


@pytest.fixture
def quadratic():
    torch.manual_seed(1)
    a = torch.randn(9, 12, dtype=torch.float64)
    model = Quadratic()
    return model, [{"a": a[:6]}, {"a": a[6:]}], model.hessian(a)


@both_ways
def test_closed_form(quadratic, hvp):
    """Central differences of a linear gradient have no truncation: what is left is rounding, 1e-16
    of the gradient over a step of ~1e-5 of the weights."""
    model, batches, H = quadratic
    exact = torch.linalg.eigvalsh(H)
    trace = hessian_trace(model, batches, hvp=hvp, num_samples=200)
    assert trace.hvp == hvp
    assert within(trace.estimate, trace.stderr, H.trace().item())
    assert trace.stderr == pytest.approx(
        math.sqrt(2 * (H.square().sum() - H.diag().square().sum()).item() / 200), rel=0.3
    )  # the variance of v'Hv for Rademacher v
    for k, which, expected in [
        (12, "largest", exact.flip(0)),
        (3, "largest", exact.flip(0)[:3]),
        (2, "smallest", exact[:2].flip(0)),
    ]:
        found = hessian_eigenvalues(model, batches, hvp=hvp, k=k, which=which)
        assert found.converged
        assert found.values == pytest.approx(expected.tolist(), rel=1e-8, abs=1e-8)


def test_repeated_eigenvalues_of_a_small_matrix():
    model = Quadratic(6)
    model.D = torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, -4.0], dtype=torch.float64)
    batch = {"a": torch.zeros(1, 6, dtype=torch.float64)}
    found = hessian_eigenvalues(model, [batch], k=5)
    assert found.values == pytest.approx([2, 2, 2, 1, 1], rel=1e-10)
    largest = hessian_eigenvalues(model, [batch], k=1, which="magnitude")
    assert largest.values == pytest.approx([-4])


@every_model
@both_ways
def test_traces(name, hvp):
    (model, batches), H = made(name), dense(name)
    exact = H.trace().item()
    trace = hessian_trace(model, batches, hvp=hvp, num_samples=200)
    assert within(trace.estimate, trace.stderr, exact)
    assert trace.stderr < 0.5 * H.square().sum().sqrt()
    options = {"method": "hutch++", "num_samples": 45}
    better = [hessian_trace(model, batches, hvp=hvp, seed=s, **options) for s in range(4)]
    mean = sum(b.estimate for b in better) / 4
    assert within(mean, sum(b.stderr**2 for b in better) ** 0.5 / 4, exact)
    assert [b.num_samples for b in better] == [45] * 4


@every_model
def test_every_parameter_and_module(name):
    (model, batches), H = made(name), dense(name)
    trace = hessian_trace(model, batches, num_samples=300)
    diagonal, start, exact = H.diag(), 0, {}
    # Of the matrices, whose attention rounds to float32: a key's bias has the derivative 0.
    rounding = torch.finfo(torch.float32).eps * H.abs().max().item()
    for parameter_name, parameter in model.named_parameters():
        exact[parameter_name] = diagonal[start : start + parameter.numel()].sum().item()
        start += parameter.numel()
    assert trace.per_parameter.keys() == exact.keys()
    for parameter_name, (estimate, stderr) in trace.per_parameter.items():
        # Of some 40 estimates one is 3 errors off in 1 of 10 models: so 4.
        off = abs(estimate - exact[parameter_name])
        assert off <= 4 * stderr + rounding, parameter_name
    for module, (estimate, stderr) in trace.per_module.items():
        inside = sum(value for n, value in exact.items() if n.startswith(f"{module}."))
        assert within(estimate, stderr, inside, errors=4), module
    parts = sum(estimate for estimate, _ in trace.per_parameter.values())
    assert parts == pytest.approx(trace.estimate)


@every_model
@both_ways
def test_eigenvalues(name, hvp):
    (model, batches), H = made(name), dense(name)
    exact = torch.linalg.eigvalsh(H)
    for k, which, expected in [
        (1, "largest", exact[-1:]),
        (4, "largest", exact.flip(0)[:4]),
        (2, "smallest", exact[:2].flip(0)),
        (1, "magnitude", exact[exact.abs().argmax()].reshape(1)),
    ]:
        found = hessian_eigenvalues(model, batches, k=k, which=which, hvp=hvp)
        assert found.converged and found.which == which
        rounded = hvp == "finite_difference"  # to (eps of float32)^(2/3), times a few
        assert found.values == pytest.approx(expected.tolist(), rel=1e-3 if rounded else 1e-4)
        for value, residual in zip(found.values, found.residuals, strict=True):
            error = (1e-3 if rounded else 1e-6) * exact.abs().max()  # of the products
            assert (exact - value).abs().min() <= residual + error


def test_a_small_basis_finds_the_same():
    (model, batches), exact = made("GPT-2"), torch.linalg.eigvalsh(dense("GPT-2"))
    found = hessian_eigenvalues(model, batches, k=2, basis_size=5, tolerance=1e-5)
    assert found.num_products > 10  # it restarted
    assert found.values == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-4)


@every_model
def test_spectrum(name):
    (model, batches), H = made(name), dense(name)
    exact = torch.linalg.eigvalsh(H)
    spectrum = hessian_spectrum(model, batches, num_samples=10, num_steps=20)
    assert spectrum.weights.sum(dim=1) == pytest.approx(torch.ones(10).numpy(), rel=1e-10)
    for power, value in [(1, exact.sum()), (2, exact.square().sum()), (3, (exact**3).sum())]:
        assert within(*spectrum.moment(power), value.item())
    width = 0.05 * (exact[-1] - exact[0]).item()
    at = torch.linspace(exact[0].item() - 5 * width, exact[-1].item() + 5 * width, 2000)
    density = spectrum.density(at.double(), width)
    z = (at.double().unsqueeze(1) - exact) / width
    blurred = torch.exp(-z.square() / 2).mean(dim=1) / (width * math.sqrt(2 * math.pi))
    step = (at[1] - at[0]).item()
    assert density.sum().item() * step == pytest.approx(1, abs=1e-3)
    # The mass in the wrong place is that of fluctuations, 1/sqrt(10 n) a bin.
    assert (density - blurred).abs().sum().item() * step < 0.1


@every_model
def test_noise_stability_is_half_the_trace(name):
    (model, batches), H = made(name), dense(name)
    sigma = 1e-3  # where the fourth order is far below the standard error
    found = noise_stability(model, batches, sigma=sigma, num_samples=200)
    assert within(found.gap, found.stderr, sigma**2 / 2 * H.trace().item())
    assert found.trace_estimate == pytest.approx(2 * found.gap / sigma**2)
    assert found.stderr < sigma**2 / 2 * H.square().sum().sqrt()


def test_central_differences_in_single_precision():
    """Rounding is about 1e-6 of the gradient, of which 5e-3 is the difference: 2e-4 of |H v|, and
    so is truncation; |H v| |v| is some ten times the spread of v'Hv."""
    model, batches = made("GPT-2")
    exact = hessian_eigenvalues(model, batches, k=3)
    model.float()
    single = hessian_eigenvalues(model, batches, k=3, hvp="finite_difference")
    assert single.values == pytest.approx(exact.values, rel=1e-3)
    a = hessian_trace(model, batches, num_samples=20, hvp="finite_difference")
    b = hessian_trace(model, batches, num_samples=20, hvp="autograd")
    spread = b.samples.sum(dim=1).std()
    assert (a.samples - b.samples).sum(dim=1).abs().max() < 1e-2 * spread


def test_a_minimum_where_the_gradient_vanishes(quadratic):
    model, batches, H = quadratic
    model.w.data.zero_()
    found = hessian_eigenvalues(model, batches, hvp="finite_difference", k=2)
    assert found.values == pytest.approx(torch.linalg.eigvalsh(H).flip(0)[:2].tolist(), rel=1e-6)


def test_merged_weights_of_adapters():
    """The Hessian by W0 + s B A is that by the weights of the merged model."""
    model, batches = made("GPT-2")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    options = {"num_samples": 10}
    merged_part = hessian_trace(adapted, batches, params="merged", **options)
    adapters = hessian_trace(adapted, batches, params="lora", **options)
    assert merged_part.names == tuple(
        f"base_model.model.transformer.h.{i}.attn.c_attn.base_layer.weight" for i in (0, 1)
    )
    assert len(adapters.names) == 4
    assert adapters.names == hessian_trace(adapted, batches, **options).names
    values = hessian_eigenvalues(adapted, batches, params="merged", k=2).values
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if "base_layer" in n)
    merged = adapted.merge_and_unload()
    expected = hessian_eigenvalues(merged, batches, params=[r"c_attn\.weight"], k=2)
    assert expected.num_parameters == merged_part.num_parameters == 2 * 6 * 18
    assert values == pytest.approx(expected.values, rel=1e-6)


def test_selections():
    model, batches = made("GPT-2")
    model.transformer.wte.weight.requires_grad_(False)
    options = {"num_samples": 1}
    everything = hessian_trace(model, batches, params="all", **options)
    assert everything.names == tuple(name for name, _ in model.named_parameters())
    trained = hessian_trace(model, batches, **options)
    assert set(everything.names) - set(trained.names) == {"transformer.wte.weight"}
    matrices = hessian_trace(model, batches, params="weight_matrices", **options)
    kinds = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    assert set(matrices.names) == {
        name for name in trained.names if name.endswith(tuple(f"{kind}.weight" for kind in kinds))
    }
    biases = hessian_trace(model, batches, params=[r"\.bias$"], **options)
    assert biases.names == tuple(name for name in trained.names if name.endswith(".bias"))


def test_bound():
    """Every figure from the dense Hessians of the batches and the formulas of the paper."""
    model, batches = made("perceptron")
    start = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    C, sigma, delta, n = 5.0, 0.03, 0.1, 500
    result = pac_bayes_bound(
        model,
        batches,
        reference=start,
        sigma=sigma,
        loss_bound=C,
        delta=delta,
        num_train=n,
        num_samples=3000,
    )
    traces = [dense_hessian(model, [batch]).trace().item() for batch in batches]
    losses = [model(**batch)["loss"].item() for batch in batches]
    counts = [len(batch["labels"]) for batch in batches]
    empirical = sum(c * loss for c, loss in zip(counts, losses, strict=True)) / 20
    r2 = 0.01 * sum(p.numel() for p in model.parameters())
    alpha = result.trace_max
    assert alpha == pytest.approx(max(traces), rel=0.02)  # 3000 probes
    assert result.trace_mean == pytest.approx(dense("perceptron").trace().item(), rel=0.02)
    assert result.empirical_loss == pytest.approx(empirical)
    assert result.largest_loss == pytest.approx(max(losses))
    assert result.distance == pytest.approx(math.sqrt(r2))

    def bound(b, s2):
        log = math.log(99 / delta)
        return (
            empirical / b
            + (1 - b) / (2 * b) * s2 * alpha
            + C * r2 / (4 * b * (1 - b) * n * s2)
            + C * log / (2 * b * (1 - b) * n)
        )

    grid = [i / 100 for i in range(1, 100)]
    assert result.bound == pytest.approx(min(bound(b, sigma**2) for b in grid))
    assert bound(result.b, sigma**2) == pytest.approx(result.bound)
    b = result.closed_form_b
    assert result.closed_form == pytest.approx(bound(b, result.optimal_sigma**2))
    assert result.closed_form == pytest.approx(
        min(bound(b, math.sqrt(C * r2 / (2 * alpha * n)) / (1 - b)) for b in grid)
    )
    # No other s is better, at any b.
    assert result.closed_form <= min(
        bound(b, result.optimal_sigma**2 * factor) for b in grid for factor in (0.5, 0.9, 1.1, 2)
    )
    assert result.leading_term == pytest.approx(math.sqrt(C * alpha * r2 / n))


def test_the_seed_decides():
    model, batches = made("perceptron")
    runs = [hessian_trace(model, batches, num_samples=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].samples, runs[1].samples)
    assert not torch.equal(runs[0].samples, runs[2].samples)
    two = [hessian_eigenvalues(model, batches, seed=seed) for seed in (0, 0)]
    assert two[0].values == two[1].values


def test_differences_that_depend_on_their_step_are_told():
    """The gradient of a network of ReLUs jumps: its differences are those of no Hessian."""
    torch.manual_seed(0)

    class Rectified(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)]
            self.layers = torch.nn.Sequential(*sizes, torch.nn.ReLU(), torch.nn.Linear(64, 5))

        def forward(self, x, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.layers(x), labels)}

    batches = [{"x": torch.randn(256, 20), "labels": torch.randint(5, (256,))}]
    model = Rectified()
    told = hessian_trace(model, batches, hvp="finite_difference", num_samples=2)
    assert any("depend on their step" in note for note in told.notes)
    assert hessian_trace(model, batches, num_samples=2).notes == ()
    smooth, data = made("GPT-2")
    assert hessian_trace(smooth, data, hvp="finite_difference", num_samples=2).notes == (
        "Dropout in evaluation mode",
    )


def test_rounding_of_the_loss_is_part_of_the_error():
    model, batches = made("GPT-2")
    lost = noise_stability(model.float(), batches, sigma=1e-5, num_samples=5)
    assert "close to the rounding of the loss" in lost.notes[-1]
    assert abs(lost.gap) < 3 * lost.stderr


def test_what_would_be_wrong_is_refused():
    model, batches = made("perceptron")
    spectrum = hessian_spectrum(model, batches, num_samples=1, num_steps=2)
    with pytest.raises(ValueError, match="power=4: 2 Lanczos steps give moments up to 3"):
        spectrum.moment(4)
    options = {"sigma": 0.1, "loss_bound": 9.0, "num_samples": 1}
    with pytest.raises(ValueError, match=r"the model's own tensor, not a copy"):
        pac_bayes_bound(model, batches, reference=model.state_dict(), **options)
    start = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"was trained too, and the bound is for all that was"):
        pac_bayes_bound(model, batches, reference=start, params=["bias"], **options)
    spoilt = [*batches[:2], {**batches[2], "x": batches[2]["x"] * math.nan}]
    with pytest.raises(ValueError, match="the loss is not finite in round 2 of 3"):
        hessian_eigenvalues(model, spoilt)
    model.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="the loss depends on none of the selected weights"):
        hessian_trace(model, batches, params=["unused"])

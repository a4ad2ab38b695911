"""The sigma that is found has the effect that was asked for: against closed forms and another
estimate of the rise."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from nso_hf import NSOTrainer
from nso_hf.curvature import find_sigma, hessian_trace, noise_stability
from nso_hf.curvature.sigma import Point, _search
from tests.curvature.dense import Quadratic, made
from tests.reference import batched, config, deviations, tiny_llama, token_data


def rise_by_hand(model, batches, sigma, relative, draws=300):
    """[E f(W + U) - f(W)]/f(W) by torch.randn and a loop, and its standard error."""
    model.eval()
    selected = [p for p in model.parameters() if p.requires_grad]
    W = [p.detach().clone() for p in selected]
    D = [
        d if relative else 1.0
        for d, p in zip(deviations(model), model.parameters(), strict=True)
        if p.requires_grad
    ]
    sizes = [len(next(iter(batch.values()))) for batch in batches]

    @torch.no_grad()
    def f():
        losses = [model(**batch)["loss"].double() for batch in batches]
        return sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    generator, clean, rises = torch.Generator().manual_seed(5), f(), []
    for _ in range(draws):
        U = [
            sigma * d * torch.randn(w.shape, generator=generator) for w, d in zip(W, D, strict=True)
        ]
        values = []
        for sign in (1, -1):
            for p, w, u in zip(selected, W, U, strict=True):
                p.data = w + sign * u.to(w.dtype)
            values.append(f())
        rises.append((sum(values) / 2 - clean) / clean)
    for p, w in zip(selected, W, strict=True):
        p.data = w
    rises = torch.stack(rises)
    return rises.mean().item(), (rises.std() / draws**0.5).item()


def learned(model, batches, steps):
    """After some training: of random weights noise takes nothing away."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batches


def lora():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    rows = token_data(8)
    return learned(model, [batched(rows[:4]), batched(rows[4:])], 100)


def clip():
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tower |= {"num_hidden_layers": 2, "projection_dim": 16}
    settings = CLIPConfig(
        text_config=tower | {"vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    tokens = torch.randint(1, 59, (8, 8))
    tokens[:, -1] = 59
    batch = {"pixel_values": torch.randn(8, 3, 16, 16), "input_ids": tokens, "return_loss": True}
    return learned(CLIPModel(settings), [batch], 10)


KINDS = {
    "perceptron": lambda: made("perceptron"),
    "GPT-2": lambda: made("GPT-2"),
    "LoRA": lora,
    "CLIP": clip,
}


@pytest.mark.parametrize(
    ("kind", "sigma_scale"),
    [*((kind, "absolute") for kind in KINDS), ("perceptron", "relative"), ("LoRA", "relative")],
)
def test_the_rise_is_that_of_an_independent_estimate(kind, sigma_scale):
    model, batches = KINDS[kind]()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    found = find_sigma(model, batches, rise=0.1, sigma_scale=sigma_scale, num_samples=300)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert found.num_samples == 300 and found.rise == 0.1 and found.sigma_scale == sigma_scale
    rise, stderr = rise_by_hand(model, batches, found.sigma, sigma_scale == "relative")
    own = 2 * 0.1 * found.stderr / found.sigma  # about, the rise growing with the square
    assert abs(rise - 0.1) < 0.015
    assert abs(rise - 0.1) < 3 * math.hypot(stderr, own) + 1e-3
    again = noise_stability(
        model, batches, sigma=found.sigma, sigma_scale=sigma_scale, num_samples=300
    )
    # The same draws: what is left is the interpolation over less than 5 % of the rise.
    assert again.gap / again.loss == pytest.approx(0.1, rel=0.01)


def test_what_training_perturbs_has_no_single_numbers():
    model, batches = clip()
    found = find_sigma(model, batches, params="perturbed", num_samples=2)
    assert found.num_parameters == sum(p.numel() for p in model.parameters()) - 1  # the temperature
    every = find_sigma(model, batches, num_samples=2)
    assert every.num_parameters == found.num_parameters + 1 and every.sigma != found.sigma


@pytest.mark.parametrize(
    ("rise", "sigma_scale"), [(0.01, "absolute"), (1.0, "absolute"), (0.1, "relative")]
)
def test_closed_form(rise, sigma_scale):
    """On a quadratic the mean rise is sigma^2/2 Tr D H D, whatever sigma is."""
    torch.manual_seed(1)
    a = torch.randn(9, 12, dtype=torch.float64)
    model, batches = Quadratic(), [{"a": a[:6]}, {"a": a[6:]}]
    H = model.hessian(a)
    D = torch.ones(len(H), dtype=torch.float64)
    if sigma_scale == "relative":
        D = torch.cat([d.flatten() for d in deviations(model)]).double()
    trace = (D * D * H.diagonal()).sum().item()
    found = find_sigma(model, batches, rise=rise, sigma_scale=sigma_scale, num_samples=3000)
    exact = math.sqrt(2 * rise * found.loss / trace)
    assert abs(found.sigma - exact) < 4 * found.stderr
    assert found.sigma == pytest.approx(exact, rel=0.01)
    for point in found.curve:
        expected = point.sigma**2 / 2 * trace / found.loss
        assert abs(point.rise - expected) < 4 * point.stderr
    measured = hessian_trace(model, batches, sigma_scale=sigma_scale, num_samples=400)
    assert abs(measured.estimate - trace) < 4 * measured.stderr + 1e-9 * trace


def test_as_many_draws_as_it_takes():
    model, batches = made("perceptron")
    found = find_sigma(model, batches, rise=0.2)
    last = min(found.curve, key=lambda point: abs(point.rise - 0.2))
    assert 16 <= found.num_samples <= 400 and last.num_samples == found.num_samples
    assert last.stderr < 0.07 * last.rise
    points = (0.5, 2)
    more = find_sigma(model, batches, rise=0.2, num_samples=4, points=points)
    sigmas = [point.sigma for point in more.curve]
    assert sigmas == sorted(sigmas) and len(sigmas) >= 3
    assert all(any(math.isclose(s, f * more.sigma) for s in sigmas) for f in points)


def test_a_trainer_and_its_model_agree(tmp_path):
    data, model = token_data(8), tiny_llama()
    trainer = NSOTrainer(model=model, args=config(tmp_path), train_dataset=data)
    batches = [batched(data[:4]), batched(data[4:])]
    options = {"rise": 0.05, "num_samples": 6}
    one = find_sigma(trainer, batches, **options)
    other = find_sigma(model, batches, **options)
    drawn = find_sigma(trainer, **options)  # its own data, in the same batches
    assert one.sigma == pytest.approx(other.sigma, rel=1e-4)
    assert drawn.sigma == pytest.approx(other.sigma, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype):
    """Losses rounded to 2^-9 of themselves at worst, a fiftieth of the rise; and sigma grows with
    its square root."""
    rows = token_data(8)
    model, batches = learned(tiny_llama(), [batched(rows[:4]), batched(rows[4:])], 60)
    exact = find_sigma(model, batches, rise=0.1, num_samples=8)
    found = find_sigma(model.to(dtype), batches, rise=0.1, num_samples=8)
    assert found.sigma == pytest.approx(exact.sigma, rel=0.02)
    with pytest.raises(ValueError, match=f"rise=0.001: {dtype} rounds the loss by about as much"):
        find_sigma(model, batches, rise=0.001)


def of_powers(rise_at):
    return lambda sigma: Point(sigma, rise_at(sigma), 0.0, 1)


@pytest.mark.parametrize("first", [1e-6, 1e-2, 1.0, 50.0])
@pytest.mark.parametrize(
    "rise_at",
    [
        lambda s: s**2,
        lambda s: 3e3 * s**4 + s**2,
        lambda s: s**2 - 0.3 * s,  # falls at first
        lambda s: math.expm1(20 * min(s, 10)),
        lambda s: math.inf if s > 0.5 else s**2,  # diverges
        lambda s: 2 * s**2 / (1 + s**2),  # ends at 2
        lambda s: 1e-2 * s**0.5,
    ],
)
def test_the_search_finds_what_there_is(rise_at, first):
    tried = _search(of_powers(rise_at), 0.03, first, 1e3)
    assert tried[-1].rise == pytest.approx(0.03, rel=0.05)
    assert len(tried) < 25


def test_what_cannot_be_found():
    with pytest.raises(ValueError, match=r"rise=3: the loss rises by 2 of itself at most"):
        _search(of_powers(lambda s: 2 * s**2 / (1 + s**2)), 3, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"at sigma 0.5 the loss jumps from 0.25 to 7 of it"):
        _search(of_powers(lambda s: 7 if s > 0.5 else s**2), 1, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"rise=1: the loss rises by more at every sigma down to"):
        _search(of_powers(lambda s: 2.0), 1, 0.1, 1.0)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.w, self.value = nn.Parameter(torch.ones(3)), value

    def forward(self, x):
        return {"loss": self.value + 0 * self.w.sum()}


@pytest.mark.parametrize(
    ("model", "options", "refused"),
    [
        (Constant(0.0), {}, "batches=1: the loss is 0, and a share of that no rise"),
        (Constant(-1.0), {}, "batches=1: the loss is -1, and a share of that no rise"),
        (Constant(2.0), {}, "rise=0.005: the loss rises by 0 of itself at most"),
        (Constant(math.nan), {}, "batches=nan: the loss is not finite in round 0 of 1"),
        (Constant(1.0), {"rise": 0.0}, "rise=0.0: must be a finite number, at least 1e-05"),
        (Constant(1.0), {"rise": -1}, "rise=-1: must be a finite number"),
        (Constant(1.0), {"rise": math.inf}, "rise=inf: must be a finite number"),
        (Constant(1.0), {"num_samples": 0}, "num_samples=0: must be an integer, at least 1"),
        (Constant(1.0), {"sigma_scale": "rows"}, "sigma_scale='rows': unknown"),
        (Constant(1.0), {"params": ["v"]}, "params='v': matches no parameter"),
    ],
)
def test_refusals(model, options, refused):
    with pytest.raises(ValueError, match=refused):
        find_sigma(model, [{"x": torch.ones(2)}], **options)


def test_no_batches():
    with pytest.raises(ValueError, match="there is no batch"):
        find_sigma(tiny_llama(), [])

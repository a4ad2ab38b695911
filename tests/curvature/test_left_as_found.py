"""The model, the random state and the machine's settings are as they were before a measurement."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nso_hf.curvature import (
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
    loss_slice,
    noise_stability,
    pac_bayes_bound,
    training_batches,
)
from tests.curvature.dense import Classifier, classifier, made
from tests.reference import DEVICE, batched, config, tiny_llama, token_data

MEASURES = {
    "trace": lambda *a, **o: hessian_trace(*a, num_samples=3, **o),
    "hutch++": lambda *a, **o: hessian_trace(*a, num_samples=6, method="hutch++", **o),
    "eigenvalues": hessian_eigenvalues,
    "spectrum": lambda *a, **o: hessian_spectrum(*a, num_steps=4, num_samples=1, **o),
    "stability": lambda *a, hvp, **o: noise_stability(*a, sigma=0.1, num_samples=2, **o),
    "bound": lambda model, *a, **o: pac_bayes_bound(
        model, *a, reference=copy.deepcopy(model), sigma=0.1, loss_bound=50.0, num_samples=2, **o
    ),
    "slice": lambda *a, hvp, **o: loss_slice(*a, num_points=3, **o),
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))


def llama():
    model = tiny_llama(dropout=0.1)
    model.train()
    model.model.layers[0].eval()  # modes may be mixed
    model.model.embed_tokens.weight.requires_grad_(False)
    batch = batched(token_data(4))
    return model, [batch]


def state_of(model):
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "required": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "random": [torch.rand(2), random.random(), np.random.rand()],
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for a, b in zip(before["weights"], after["weights"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before["gradients"], after["gradients"], strict=True):
        assert a is b
    for key in ("required", "modes", "attention", "grad_enabled"):
        assert before[key] == after[key]
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1:] == after["random"][1:]


def seeded():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


@every_measure
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_everything_is_as_it_was(measure, hvp):
    model, batches = llama()
    model(**batches[0]).loss.backward()  # gradients that somebody needs
    seeded()
    before = state_of(model)
    seeded()
    measure(model, batches, hvp=hvp)
    assert_same(before, state_of(model))


@every_measure
@pytest.mark.parametrize("call", [3, 5])
def test_so_it_is_after_an_interrupt(measure, call, monkeypatch):
    model, batches = llama()
    seeded()
    before = state_of(model)
    forward, calls = model.forward, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", interrupted)
    seeded()
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, hvp="finite_difference")
    monkeypatch.undo()
    assert_same(before, state_of(model))


def test_it_works_where_gradients_are_off():
    model, batches = made("perceptron")
    expected = hessian_trace(model, batches, num_samples=2)
    with torch.no_grad():
        found = hessian_trace(model, batches, num_samples=2)
    assert torch.equal(found.samples, expected.samples)


def test_dropout_is_off_and_said_to_be():
    model, batches = classifier()
    model.train()
    trace = hessian_trace(model, batches, num_samples=2)
    assert trace.notes == ("Dropout in evaluation mode",)
    model.eval()
    assert torch.equal(hessian_trace(model, batches, num_samples=2).samples, trace.samples)


def test_batch_normalisation_uses_its_running_statistics():
    class Normalised(Classifier):
        def __init__(self):
            super().__init__()
            self.dropout = nn.BatchNorm1d(9)

    torch.manual_seed(0)
    model, batches = Normalised(), classifier()[1]
    statistics = model.dropout.running_mean.clone()
    trace = hessian_trace(model, batches, num_samples=2)
    assert trace.notes == ("BatchNorm1d in evaluation mode",)
    assert torch.equal(model.dropout.running_mean, statistics)


def test_a_random_loss_is_refused():
    class Random(Classifier):
        def forward(self, x, labels):
            return super().forward(x + 0.1 * torch.randn_like(x), labels)

    with pytest.raises(ValueError, match=r"its loss is random .* in evaluation mode too"):
        hessian_trace(Random(), classifier()[1])


def test_fused_attention_is_replaced_where_it_has_no_second_derivative():
    model, batches = llama()
    assert model.config._attn_implementation == "sdpa"
    trace = hessian_trace(model, batches, num_samples=2)
    assert trace.hvp == "autograd"
    model.set_attn_implementation("eager")
    eager = hessian_trace(model, batches, num_samples=2)
    # The same sums in another order: a few ulps of the parts, which are ~1e2.
    assert (trace.samples - eager.samples).abs().max() < 1e-3


class Once(torch.autograd.Function):
    """A function with a first derivative alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x):
        return {"loss": (Once.apply(self.w) * x).mean()}


def test_a_model_without_double_backward_is_measured_by_differences():
    """f = mean(w^3): the Hessian is diag(3 w). Double backward gives 0 without a word, since the
    gradient that comes into `Once` is a constant."""
    batches = [{"x": torch.ones(2, dtype=torch.float64)}]
    found = hessian_eigenvalues(Cubic(), batches, k=2)
    assert found.hvp == "finite_difference"
    because = "no second derivative of Once, by comparison"
    assert found.notes == (f"central differences of gradients: {because}",)
    assert found.values == pytest.approx([6, 3], rel=1e-6)
    with pytest.raises(ValueError, match=f"hvp='autograd': {because}"):
        hessian_eigenvalues(Cubic(), batches, hvp="autograd")


def test_mixed_precision_of_the_trainer_is_lifted(tmp_path):
    """A forward pass that Accelerate made compute in bfloat16 is measured in float32."""
    from nso_hf import NSOTrainer

    def trainer(**options):
        args = config(tmp_path, max_steps=1, learning_rate=0.0, **options)
        made = NSOTrainer(model=tiny_llama(), args=args, train_dataset=token_data(8))
        made.train()
        return made

    plain, mixed = trainer(), trainer(bf16=True)
    assert hasattr(mixed.model, "_original_forward")
    batches = training_batches(plain, 2)
    expected = hessian_trace(plain, batches, num_samples=2)
    found = hessian_trace(mixed, batches, num_samples=2)
    assert torch.equal(found.samples, expected.samples)
    with torch.no_grad():
        hidden = []
        mixed.model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda module, inputs, output: hidden.append(output.dtype)
        )
        mixed.model(**{name: value.to(DEVICE) for name, value in batches[0].items()})
    assert hidden == [torch.bfloat16]  # again


def test_a_compiled_or_wrapped_model_is_the_model():
    model, batches = made("perceptron")
    expected = hessian_trace(model, batches, num_samples=2)
    found = hessian_trace(torch.compile(model, backend="eager"), batches, num_samples=2)
    assert torch.equal(found.samples, expected.samples)
    assert found.names == expected.names


def test_tied_weights_count_once():
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=None, eos_token_id=None))
    tokens = torch.randint(11, (2, 4))
    trace = hessian_trace(model, [{"input_ids": tokens, "labels": tokens}], num_samples=2)
    assert trace.num_parameters == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in trace.names

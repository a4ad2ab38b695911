"""The zeroth-order estimate against the directional derivative, and what it keeps in memory."""

import gc

import pytest
import torch
from torch.optim import SGD
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from benchmarks.allocations import CountAllocations
from nso_hf import NSOTrainer
from nso_hf.step.noise import Noise
from tests.curvature.dense import Classifier
from tests.older import IS_VERSION_4
from tests.reference import DEVICE, batched, config, whole_noise


@pytest.mark.parametrize("k", [1, 3])
def test_the_estimate_is_the_derivative_along_each_draw(tmp_path, k):
    torch.manual_seed(0)
    model = Classifier().double().to(DEVICE)
    rows = [
        {"x": x, "labels": label}
        for x, label in zip(torch.randn(8, 6).double(), torch.randint(4, (8,)), strict=True)
    ]
    batch = batched(rows)
    model.eval()
    model(**batch)["loss"].backward()
    W = [p.detach().clone() for p in model.parameters()]
    gradient = [p.grad.clone() for p in model.parameters()]
    expected = [torch.zeros_like(p) for p in W]
    for j in range(k):
        noise = Noise(42, 0, j, 1.0)
        z = [whole_noise(p, i, noise).double() for i, p in enumerate(model.parameters())]
        slope = sum((u * g).sum() for u, g in zip(z, gradient, strict=True))
        for each, u in zip(expected, z, strict=True):
            each += slope * u / k
    model.zero_grad()
    args = config(
        tmp_path,
        method="zo",
        method_kwargs={"mu": 1e-4},
        num_perturbations=k,
        per_device_train_batch_size=8,
        max_steps=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    optimizer = SGD(model.parameters(), lr=1.0)
    NSOTrainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None)).train()
    # A third derivative along z, of size |z|^3 = 10^3, times mu^2/6; z itself in float32.
    for w, p, g in zip(W, model.parameters(), expected, strict=True):
        torch.testing.assert_close(w - p.detach(), g, rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in expected) > 0.1


class Counted(TrainerCallback):
    """The memory of the second step: the first makes what lasts."""

    def __init__(self):
        self.allocations = CountAllocations()

    def on_step_begin(self, args, state, *others, **kwargs):
        if state.global_step == 1:
            gc.collect()
            self.allocations.__enter__()

    def on_pre_optimizer_step(self, args, state, *others, **kwargs):
        if state.global_step == 1:
            self.allocations.__exit__(None, None, None)


def test_a_step_takes_the_memory_of_inference_and_one_copy_of_the_weights(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=6, n_head=4)).to(DEVICE)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(500, (8, 64))]
    batch = batched(rows)
    copy = sum(p.numel() * p.element_size() for p in model.parameters())

    def step(trainer_class, **options):
        watch = Counted()
        args = config(
            tmp_path, max_steps=2, per_device_train_batch_size=8, learning_rate=0.0, **options
        )
        trainer = trainer_class(model=model, args=args, train_dataset=rows, callbacks=[watch])
        trainer.train()
        model.zero_grad()
        return watch.allocations.peak

    model.eval()
    with torch.no_grad(), CountAllocations() as inference:
        model(**batch, use_cache=IS_VERSION_4)  # which leaves it on in training
    zo, plain = step(NSOTrainer, method="zo"), step(Trainer)
    assert zo <= 1.05 * inference.peak + copy
    assert plain >= 2 * zo

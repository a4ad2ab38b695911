"""Between the micro-batches of a step the weights are at W and the noise is kept beside them: it is
drawn once a step, and nothing else changes."""

import os
import signal

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.allocations import CountAllocations
from nso_hf import NSOTrainer
from nso_hf.backends import select
from nso_hf.step.noise import BLOCK, Noise
from nso_hf.step.perturbation import Perturbation, borrowed
from tests.reference import config, tiny_llama, token_data, train

WAYS = {
    "both": ({}, [1, -1] * 4),
    "one-sided": ({"two_sided": False}, [1] * 4),
    "alternate": ({"sign": "alternate"}, [1, -1] * 2),
    "alternate with clean": (
        {"sign": "alternate", "two_sided": False, "clean_weight": 0.5},
        [0, 1] * 2,
    ),
    "both and clean": ({"clean_weight": 0.5}, [0, 1, -1] * 4),
}


def watch(model):
    """The weights in each evaluation from now on."""
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append([p.detach().clone() for p in model.parameters()])
    )
    return seen


def drawn(monkeypatch):
    """The draws from now on."""
    draws, original = [], Noise.add_to

    def add_to(self, weights):
        draws.append(self)
        original(self, weights)

    monkeypatch.setattr(Noise, "add_to", add_to)
    return draws


def displaced(model, trainer, step, sigma):
    """W + U of a step, by the noise alone."""
    weights = trainer.nso_weights()[1]
    before = [w.data.clone() for w in weights]
    Noise(trainer.args.seed, step, 0, sigma).add_to(weights)
    after = [w.data.clone() for w in weights]
    for weight, data in zip(weights, before, strict=True):
        weight.data.copy_(data)
    return before, after


@pytest.mark.parametrize("way", WAYS)
def test_one_draw_a_step_and_every_evaluation_where_it_belongs(tmp_path, monkeypatch, way):
    options, signs = WAYS[way]
    model, sigma = tiny_llama(), 0.05
    args = config(
        tmp_path,
        max_steps=2,
        learning_rate=0.0,
        gradient_accumulation_steps=4,
        sigma=sigma,
        **options,
    )
    trainer = NSOTrainer(model=model, args=args, train_dataset=token_data(64))
    draws, seen = drawn(monkeypatch), watch(model)
    trainer.train()
    assert [draw.step for draw in draws] == [0, 1]
    assert len(seen) == 2 * len(signs)
    for step in range(2):
        before, after = displaced(model, trainer, step, sigma)
        evaluations = seen[step * len(signs) : (step + 1) * len(signs)]
        for sign, found in zip(signs, evaluations, strict=True):
            for w, moved, p in zip(before, after, found, strict=True):
                expected = {0: w, 1: moved, -1: 2 * w - moved}[sign]
                # Each of up to 8 reflections rounds twice, by half of 2^-23 of its result.
                rounding = 8 * 2**-23 * (w.abs() + moved.abs()).max().item()
                torch.testing.assert_close(p, expected, rtol=0, atol=rounding)
                assert sign == 0 or not torch.equal(p, w)


def test_a_draw_in_each_micro_batch_where_there_are_several(tmp_path, monkeypatch):
    draws = drawn(monkeypatch)
    args = config(tmp_path, max_steps=1, num_perturbations=2, gradient_accumulation_steps=2)
    train(tiny_llama(), token_data(16), args)
    assert [draw.draw for draw in draws] == [0, 1, 0, 1]


class Edit(TrainerCallback):
    """Adds one to the first weight after the first micro-batch of each step."""

    def __init__(self, through_data):
        self.through_data = through_data

    def on_substep_end(self, *args, model=None, **kwargs):
        weight = next(model.parameters())
        with torch.no_grad():
            (weight.data if self.through_data else weight).add_(1.0)


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_edited_between_micro_batches_are_displaced_as_they_are(
    tmp_path, monkeypatch, through_data
):
    draws = drawn(monkeypatch)
    args = config(
        tmp_path, max_steps=2, learning_rate=0.0, gradient_accumulation_steps=2, sigma=0.05
    )
    model = tiny_llama()
    first = next(model.parameters())
    start = first.detach().clone()
    seen = watch(model)
    train(model, token_data(64), args, callbacks=[Edit(through_data)])
    assert torch.equal(first, start + 1 + 1)
    for number, ones in enumerate([0, 0, 1, 1, 1, 1, 2, 2]):
        # Noise of deviation .05, whose greatest of some thousand elements is below 7 of these.
        moved = seen[number][0] - start - ones
        assert 0 < moved.abs().max() < 0.35
    assert [draw.step for draw in draws] == [0, 0, 1, 1]


def parts(*shapes, dtype=torch.float32):
    model = nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape, dtype=dtype)))
    return model


def in_and_out(model, tmp_path):
    trainer = NSOTrainer(model=tiny_llama(), args=config(tmp_path))
    backend = select(trainer.accelerator, model)
    return backend, backend.weights([])


@pytest.mark.parametrize("backup", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_all_kinds_come_back_bit_for_bit(tmp_path, dtype, backup):
    model = parts((300, 300), (7,), (), (0, 3), (2**16,), (3, 2**15), dtype=dtype)
    model.w0.data = model.w0.data.t()  # not contiguous
    before = [p.detach().clone() for p in model.parameters()]
    backend, weights = in_and_out(model, tmp_path)
    noise, used = Noise(0, 0, 0, 0.1), Perturbation(weights, backend, backup=backup)
    for sign in (1, 1, -1, 1):
        with borrowed(weights, backend, used):
            used.move_to(noise, sign)
            moved = sum((p != w).sum() for p, w in zip(model.parameters(), before, strict=True))
            # The rest is lost to half precision.
            assert moved > 0.5 * sum(w.numel() for w in before)
            used.move_to(noise, -sign)
            used.park(thoroughly=True)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not used.was_edited


@pytest.mark.parametrize("backup", ["device", "cpu"])
def test_memory_of_one_copy(tmp_path, backup):
    backend, weights = in_and_out(parts((2**11, 2**11), (2**22,)), tmp_path)
    copy = 2**23 * 4
    with CountAllocations() as allocations:
        used = Perturbation(weights, backend, backup=backup)
        for sign in (1, -1, 1):
            with borrowed(weights, backend, used):
                used.move_to(Noise(0, 0, 0, 0.1), sign)
                used.move_to(Noise(0, 0, 0, 0.1), -sign)
                used.park(thoroughly=False)
    # A block of noise for each thread beside it, or two pieces of 2^16 elements.
    beside = 4 * max(torch.get_num_threads() * BLOCK, 2 * 2**16)
    assert copy <= allocations.peak <= copy + beside


def test_training_is_the_same_with_the_backup_on_the_cpu(tmp_path):
    models = []
    for backup in ("device", "cpu"):
        model = tiny_llama()
        options = {"backup": backup, "gradient_accumulation_steps": 2, "sigma": 0.05}
        train(model, token_data(16), config(tmp_path, learning_rate=1e-2, **options))
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_an_interrupt_waits_until_all_weights_are_exchanged(tmp_path, monkeypatch):
    model = tiny_llama()
    before = [p.detach().clone() for p in model.parameters()]
    original, sent = Perturbation._exchange, []
    before_all = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored

    def exchange(self, sign):
        with monkeypatch.context() as patched:
            copy = torch._foreach_copy_

            def copy_and_interrupt(*args, **kwargs):
                sent.append(os.kill(os.getpid(), signal.SIGINT))
                copy(*args, **kwargs)

            patched.setattr(torch, "_foreach_copy_", copy_and_interrupt)
            original(self, sign)

    monkeypatch.setattr(Perturbation, "_exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        train(model, token_data(16), config(tmp_path, gradient_accumulation_steps=2))
    assert len(sent) >= 2
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert signal.signal(signal.SIGINT, before_all) is signal.default_int_handler

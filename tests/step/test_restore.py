"""Weights come back bit for bit, whatever happens while they are displaced."""

import pytest
import torch
from transformers import TrainerCallback

from nso_hf import NSOTrainer
from tests.reference import config, tiny_llama, token_data, train


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_perturbations": 2, "clean_weight": 0.3},
        {"two_sided": False},
        {"sign": "alternate", "gradient_accumulation_steps": 2},
        {"log_sharpness": True},
    ],
)
def test_weights_are_bit_identical_at_learning_rate_zero(tmp_path, dtype, options):
    model = tiny_llama().to(dtype)
    before = copies(model)
    displaced = []
    model.register_forward_pre_hook(lambda *_: displaced.append(not unchanged(model, before)))
    args = config(tmp_path, learning_rate=0.0, max_steps=20, sigma=0.05, **options)
    train(model, token_data(160), args)
    assert sum(displaced) >= 20, "the noise was never applied"
    assert unchanged(model, before)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_weights_survive_an_exception_in_any_pass(tmp_path, error, fail_at):
    model = tiny_llama()
    before = copies(model)
    calls = []

    class Failing(NSOTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(unchanged(model, before))
            if len(calls) == fail_at:
                raise error
            return super().compute_loss(*args, **kwargs)

    trainer = Failing(
        model=model, args=config(tmp_path, learning_rate=0.0), train_dataset=token_data(16)
    )
    with pytest.raises(error):
        trainer.train()
    assert calls == [False] * fail_at
    assert unchanged(model, before)
    assert "backward" not in vars(trainer.accelerator)
    trainer.train()
    assert unchanged(model, before)


def test_an_interrupt_during_the_noise_or_the_restore_is_undone(tmp_path, monkeypatch):
    from nso_hf.step.noise import Noise
    from nso_hf.step.perturbation import Perturbation

    original = Noise.add_to

    def interrupted(self, weights):
        original(self, weights[:1])
        raise KeyboardInterrupt

    model = tiny_llama()
    before = copies(model)
    monkeypatch.setattr(Noise, "add_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, token_data(16), config(tmp_path))
    assert unchanged(model, before)

    monkeypatch.setattr(Noise, "add_to", original)
    restore, interrupts = Perturbation.restore, []

    def restore_interrupted(self):
        if self._at is not None and not interrupts:
            interrupts.append(True)
            self._data[0].copy_(self._backup[0])
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Perturbation, "restore", restore_interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, token_data(16), config(tmp_path))
    assert interrupts and unchanged(model, before)


def test_out_of_memory_retry_starts_from_clean_weights(tmp_path):
    """`auto_find_batch_size` after an out-of-memory error in the second pass = a run at the smaller
    batch size."""
    data = token_data(64)
    sizes = []

    class OutOfMemoryOnce(NSOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            sizes.append(len(inputs["input_ids"]))
            if sizes == [10, 10]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(model, inputs, **kwargs)

    results = []
    for trainer_class, size in [(OutOfMemoryOnce, 10), (NSOTrainer, 9)]:
        model = tiny_llama()
        args = config(
            tmp_path,
            auto_find_batch_size=True,
            per_device_train_batch_size=size,
            sign="both",
            sigma=0.05,
            learning_rate=1e-2,
            gradient_accumulation_steps=2,
        )
        trainer_class(model=model, args=args, train_dataset=data).train()
        results.append(copies(model))
    assert sizes[:4] == [10, 10, 9, 9]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_callbacks_see_unperturbed_weights(tmp_path):
    model = tiny_llama()
    before = copies(model)
    seen = []

    class Look(TrainerCallback):
        def look(self, *args, model=None, **kwargs):
            seen.append(unchanged(model, before))

        on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = on_log = look

    args = config(tmp_path, learning_rate=0.0, gradient_accumulation_steps=2)
    train(model, token_data(24), args, callbacks=[Look()])
    assert len(seen) >= 3 * 5 and all(seen)


def test_a_schedule_free_optimizer_switches_before_the_backup(tmp_path):
    """Schedule-free optimizers edit the weights in `train()`: that edit must outlive the
    restore."""

    class Switching(torch.optim.SGD):
        in_training = True

        def train(self):
            if not self.in_training:
                for group in self.param_groups:
                    for p in group["params"]:
                        p.data.add_(1.0)
            self.in_training = True

    model = tiny_llama()
    before = copies(model)
    optimizer = Switching(model.parameters(), lr=0.0)
    optimizer.in_training = False
    train(model, token_data(16), config(tmp_path), optimizers=(optimizer, None))
    assert all(torch.equal(p, w + 1) for p, w in zip(model.parameters(), before, strict=True))

"""A loss scale, as half precision needs it, on CPUs: gradients are unscaled where a method is not
linear in them, and a step that is skipped leaves nothing behind."""

import pytest
import torch
from torch.optim import SGD

from nso_hf import NSOTrainer
from tests.methods.equations import (
    EQUATIONS,
    OPTIONS,
    SHARED,
    TOLERANCE,
    learning_rate,
    momentum,
    reference_method,
)
from tests.reference import config, largest_difference, tiny_llama, token_data


class Scaling(NSOTrainer):
    """With a loss scale, but in float32; `poisoned` passes have an infinite loss."""

    poisoned: tuple[int, ...] = ()

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.scaler = self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.count = Count()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.count.passes += 1
        return loss * torch.inf if self.count.passes - 1 in self.poisoned else loss


class Count:
    passes = 0


def trained(folder, name, data, poisoned=(), steps=3, **given):
    model = tiny_llama()
    args = config(
        folder,
        method=name,
        method_kwargs=OPTIONS[name],
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        max_steps=steps,
        **SHARED.get(name, {}),
        **given,
    )
    optimizer = SGD(model.parameters(), lr=learning_rate(name), momentum=momentum(name))
    trainer = Scaling(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    trainer.poisoned = poisoned
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradients_are_unscaled(tmp_path, name):
    data = token_data(24)
    expected = tiny_llama()
    reference_method(expected, name, data, steps=3, batch=8, micro_batches=1)
    model, trainer = trained(tmp_path, name, data)
    assert trainer.scaler.get_scale() == 2.0**10
    assert largest_difference(model, expected) <= TOLERANCE[name]


@pytest.mark.parametrize("poisoned", [0, 1])
@pytest.mark.parametrize("name", ["sam", "asam", "fsam", "cr_sam", "hero", "rsam", "bsam"])
def test_a_step_with_an_infinite_pass_is_skipped_whole(tmp_path, name, poisoned):
    model, trainer = trained(tmp_path, name, token_data(8), (poisoned,), steps=1)
    assert trainer.scaler.get_scale() < 2.0**10  # the scaler has seen it
    assert largest_difference(model, tiny_llama()) == 0


@pytest.mark.parametrize(("name", "poisoned"), [("fsam", 0), ("fsam", 1), ("async_sam", 0)])
def test_what_is_remembered_outlives_a_step_that_is_skipped(tmp_path, name, poisoned):
    """Training goes on as if the step had not been."""
    data = token_data(24)
    skipped, _ = trained(tmp_path, name, data, (poisoned,))
    without, _ = trained(tmp_path, name, data[8:], steps=2)
    # Scales of 2^9 and 2^10 round the gradients alike, but for the smallest.
    assert largest_difference(skipped, without) <= 1e-7
    assert largest_difference(skipped, tiny_llama()) > 1e-2

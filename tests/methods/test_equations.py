"""Every method against a plain-PyTorch loop written from its equation."""

import pytest
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


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_method_is_its_equation(tmp_path, name, accumulation):
    data = token_data(24)
    expected = tiny_llama()
    losses = reference_method(expected, name, data, steps=3, batch=8, micro_batches=accumulation)
    model = tiny_llama()
    args = config(
        tmp_path,
        method=name,
        method_kwargs=OPTIONS[name],
        **SHARED.get(name, {}),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    optimizer = SGD(model.parameters(), lr=learning_rate(name), momentum=momentum(name))
    trainer = NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert largest_difference(model, expected) <= TOLERANCE[name]
    plain = tiny_llama()
    reference_method(plain, None, data, steps=3, batch=8, micro_batches=accumulation)
    assert largest_difference(plain, expected) > 20 * TOLERANCE[name]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=2e-4)


def test_hero_differentiates_twice_where_it_is_asked_to(tmp_path):
    data = token_data(24)
    expected = tiny_llama()
    reference_method(expected, "hero", data, steps=3, batch=8, micro_batches=2)
    model = tiny_llama()
    model.set_attn_implementation("eager")
    args = config(
        tmp_path,
        method="hero",
        method_kwargs={**OPTIONS["hero"], "exact": True},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    optimizer = SGD(model.parameters(), lr=learning_rate("hero"))
    NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
    assert largest_difference(model, expected) <= 1e-6

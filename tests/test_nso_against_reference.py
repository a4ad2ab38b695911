"""NSO through the Trainer against a plain-PyTorch loop that follows the formula."""

import pytest
import torch
from torch.optim import SGD

from tests.older import LOGGED
from tests.reference import config, largest_difference, reference_nso, tiny_llama, token_data, train

# Weights are of size 0.1 and move by up to 6e-2; float32 rounding (6e-8 relative) in some tens of
# sums over 3 steps.
TOLERANCE = 1e-6
STEPS, GLOBAL_BATCH, LEARNING_RATE, SIGMA = 3, 8, 1.0, 0.05


def sgd(model):
    return {"optimizers": (SGD(model.parameters(), lr=LEARNING_RATE), None)}


CASES = {
    "paper": {},
    "k2-lambda": {"num_perturbations": 2, "clean_weight": 0.3},
    "one-sided": {"two_sided": False, "num_perturbations": 2},
    "one-sided-lambda": {"two_sided": False, "clean_weight": 0.5},
    "uniform": {"distribution": "uniform"},
    "laplace": {"distribution": "laplace"},
    "rademacher": {"distribution": "rademacher"},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_the_formula(tmp_path, case, accumulation):
    options = CASES[case]
    data = token_data(STEPS * GLOBAL_BATCH)
    reference = tiny_llama()
    losses = reference_nso(
        reference,
        data,
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        learning_rate=LEARNING_RATE,
        sigma=SIGMA,
        k=options.get("num_perturbations", 1),
        lam=options.get("clean_weight", 0.0),
        two_sided=options.get("two_sided", True),
        distribution=options.get("distribution", "normal"),
    )
    plain = tiny_llama()
    reference_nso(
        plain, data, steps=STEPS, global_batch=GLOBAL_BATCH, learning_rate=LEARNING_RATE, sigma=0.0
    )
    model = tiny_llama()
    args = config(
        tmp_path,
        sigma=SIGMA,
        per_device_train_batch_size=GLOBAL_BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        **options,
    )
    trainer = train(model, data, args, **sgd(model))
    assert largest_difference(model, reference) <= TOLERANCE
    assert largest_difference(plain, reference) > 1e-3, (
        "the noise must matter for the test to be able to fail"
    )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=LOGGED)
    norms = [e["nso/perturbation_norm"] for e in trainer.state.log_history if "loss" in e]
    expected = SIGMA * sum(p.numel() for p in model.parameters()) ** 0.5
    assert norms == pytest.approx([expected] * STEPS, rel=0.05)


@pytest.mark.parametrize(
    ("k", "lam", "two_sided"),
    [(1, 0, True), (2, 0, True), (1, 0.3, True), (1, 0.3, False), (2, 0.6, False)],
)
def test_alternate_equals_the_formula_at_the_price_of_plain_training(tmp_path, k, lam, two_sided):
    data = token_data(STEPS * GLOBAL_BATCH)
    reference = tiny_llama()
    reference_nso(
        reference,
        data,
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        learning_rate=LEARNING_RATE,
        sigma=SIGMA,
        k=k,
        lam=lam,
        two_sided=two_sided,
        alternate_micro_batches=4,
    )
    forwards = {}
    for sign in ("alternate", "plain"):
        model = tiny_llama()
        count = []
        model.register_forward_hook(lambda *_, count=count: count.append(1))
        args = config(
            tmp_path,
            sigma=SIGMA if sign == "alternate" else 0.0,
            sign="alternate" if sign == "alternate" else "both",
            num_perturbations=k,
            clean_weight=lam if sign == "alternate" else 0.0,
            two_sided=two_sided,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            lr_scheduler_type="constant",
        )
        train(model, data, args, **sgd(model))
        forwards[sign] = len(count)
        difference = largest_difference(model, reference)
        assert difference <= TOLERANCE if sign == "alternate" else difference > 1e-3
    assert forwards["alternate"] == forwards["plain"] == STEPS * 4


def test_number_of_passes_is_what_the_formula_needs(tmp_path):
    for options, passes in [
        ({"sigma": 0.0}, 1),
        ({"clean_weight": 1.0}, 1),
        ({}, 2),
        ({"clean_weight": 0.5}, 3),
        ({"num_perturbations": 3}, 6),
        ({"two_sided": False, "num_perturbations": 3}, 3),
    ]:
        model = tiny_llama()
        count = []
        model.register_forward_hook(lambda *_, count=count: count.append(torch.is_grad_enabled()))
        trainer = train(model, token_data(4), config(tmp_path, max_steps=1, **options))
        assert count == [True] * passes
        once = trainer.floating_point_ops({"input_ids": torch.zeros(4, 12)})
        assert trainer.state.total_flos == passes * once
    # The forward pass at W for the trace is a third of a pass.
    trainer = train(tiny_llama(), token_data(4), config(tmp_path, max_steps=1, log_sharpness=True))
    assert trainer.state.total_flos == pytest.approx((2 + 1 / 3) * once)

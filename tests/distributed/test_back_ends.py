"""What every back end has to do, besides the steps of test_matrix.py: two processes each."""

from functools import cache

import pytest
import torch

from tests.distributed.back_ends import BACK_ENDS, assert_is
from tests.distributed.launch import launch
from tests.reference import (
    causal_loss_sum,
    config,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
    train,
)

pytestmark = pytest.mark.distributed

SIGMA, TOLERANCE = 0.05, 1e-6  # as in test_matrix.py
NSO = {"sigma": SIGMA, "num_perturbations": 2, "clean_weight": 0.3, "max_grad_norm": 0.5}
PASSES = 5  # evaluations of a micro-batch: the clean one, and both signs of two draws
ONE = {**NSO, "per_device_train_batch_size": 4}
TWO = {**NSO, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
FAILURES = {
    f"failure in the {place}, evaluation {number}": {"fail_at": place, "fail_in": number}
    for place in ("loss", "forward", "backward")
    for number in (2, 5)
}
CASES = {
    "evaluation": {**ONE, "eval_strategy": "steps", "eval_steps": 1},
    "partial window": {
        **NSO,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
    "no clipping": {**ONE, "max_grad_norm": 0.0},
    "sharpness": {"sigma": SIGMA, "per_device_train_batch_size": 4, "log_sharpness": True},
    "alternate": {**TWO, "clean_weight": 0.0, "sign": "alternate"},
    "alternate, shared": {
        **TWO,
        "clean_weight": 0.0,
        "sign": "alternate",
        "num_perturbations": 1,
    },
    "one": ONE,
    "one, plain": {"plain": True, "per_device_train_batch_size": 4},
    "two": TWO,
    "two, plain": {
        "plain": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "learning rate 0": {**TWO, "experiment": "restore", "max_steps": 10},
    **{name: {**ONE, "experiment": "restore", **case} for name, case in FAILURES.items()},
}


def launch_or_error(cases, directory, processes=2):
    try:
        return launch(cases, directory, processes)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The results of a back end's cases on each rank, all run when the first is asked for."""

    @cache
    def run_once(back_end):
        unfit = "alternate" if shares_weights(back_end) else "alternate, shared"
        cases = {
            name: {"back_end": back_end, **case} for name, case in CASES.items() if name != unfit
        }
        return launch_or_error(cases, tmp_path_factory.mktemp("back_ends"))

    def results(back_end, name):
        ranks = run_once(back_end)
        if isinstance(ranks, Exception):
            raise ranks
        for rank in ranks:
            if "plain" not in name:
                assert_is(back_end, rank[name], processes=2)
        return [rank[name] for rank in ranks]

    return results


def shares_weights(back_end):
    """Whether the two processes hold one copy of the weights between them."""
    return back_end.startswith(("fsdp2", "zero3"))


every_back_end = pytest.mark.parametrize("back_end", BACK_ENDS)


def reference(steps=3, global_batch=8, clip=0.5, **options):
    options = {"sigma": SIGMA, "k": 2, "lam": 0.3, **options}
    model = tiny_llama()
    losses = reference_nso(
        model,
        token_data(48),
        steps=steps,
        global_batch=global_batch,
        max_grad_norm=clip,
        **options,
    )
    return model, losses


def assert_equal(results, model, tolerance=TOLERANCE):
    for result in results:
        for p, w in zip(model.parameters(), result["weights"], strict=True):
            assert (p - w).abs().max() <= tolerance


@every_back_end
def test_evaluation_between_steps(run, back_end):
    """Its forward passes leave weights gathered; they must be W, and not be used again."""
    results = run(back_end, "evaluation")
    model, losses = reference()
    assert_equal(results, model)
    data = token_data(8, seed=2)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    with torch.no_grad():
        halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
        # The Trainer averages the mean losses of the processes' batches.
        means = [
            causal_loss_sum(model, half) / (half["labels"][:, 1:] != -100).sum() for half in halves
        ]
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=1e-5)
        assert len(result["eval_losses"]) == 3
        assert result["eval_losses"][-1] == pytest.approx(sum(means).item() / 2, abs=2e-3)


@every_back_end
def test_partial_last_accumulation_window(run, back_end):
    model, _ = reference(steps=2, global_batch=[32, 16])
    assert_equal(run(back_end, "partial window"), model)


@every_back_end
def test_no_clipping(run, back_end):
    model, _ = reference(clip=0)
    clipped, _ = reference()
    assert largest_difference(model, clipped) > 1e-3
    assert_equal(run(back_end, "no clipping"), model)


@every_back_end
def test_sharpness_is_that_of_the_global_batch(run, back_end, tmp_path):
    args = config(
        tmp_path,
        sigma=SIGMA,
        per_device_train_batch_size=8,
        log_sharpness=True,
        lr_scheduler_type="constant",
        optim="sgd",
        learning_rate=1.0,
    )
    trainer = train(tiny_llama(), token_data(48), args)
    expected = [e["nso/trace_estimate"] for e in trainer.state.log_history if "loss" in e]
    norms = [e["nso/perturbation_norm"] for e in trainer.state.log_history if "loss" in e]
    assert len(set(expected)) == 3 and max(map(abs, expected)) > 0.1
    for result in run(back_end, "sharpness"):
        # Losses of ~4 in float32 (ulp 5e-7), a few of them, over sigma^2 = 2.5e-3.
        assert result["traces"] == pytest.approx(expected, abs=2e-3)
        assert result["norms"] == pytest.approx(norms, rel=1e-6)


@every_back_end
def test_alternating_signs(run, back_end):
    """Processes that hold copies of the weights take different signs; processes that share one
    copy are at the same point, so that signs alternate over accumulation steps alone."""
    copies = 1 if shares_weights(back_end) else 2
    model, _ = reference(lam=0, k=copies, alternate_micro_batches=2 * copies)
    assert_equal(run(back_end, "alternate" if copies == 2 else "alternate, shared"), model)


@every_back_end
@pytest.mark.parametrize("name", ["learning rate 0", *FAILURES])
def test_weights_are_restored_bit_for_bit(run, back_end, name):
    for result in run(back_end, name):
        assert result["differ"] == []
        assert result["elements"] > 0
        assert result["left"] == [False, False]
        if name in FAILURES:
            assert result["failed"]
            assert result["evaluations"] == FAILURES[name]["fail_in"]
        else:
            assert result["evaluations"] == 10 * 2 * PASSES

"""The same curvature from one process and from two, on every back end."""

from functools import cache

import pytest
import torch

from nso_hf import NSOTrainer
from nso_hf.curvature import (
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
    noise_stability,
    pac_bayes_bound,
    training_batches,
)
from tests.distributed.back_ends import BACK_ENDS, assert_is
from tests.distributed.launch import launched
from tests.reference import config, tiny_llama, token_data

pytestmark = pytest.mark.distributed

CASES = {
    "auto": {"experiment": "curvature", "options": {}},
    "differences": {"experiment": "curvature", "options": {"hvp": "finite_difference"}},
    "watched": {"experiment": "watch", "dropout": 0.1, "max_steps": 4, "sigma": 0.02},
    "bf16": {"experiment": "curvature", "options": {}, "bf16": True},
    "watched, bf16": {"experiment": "watch", "max_steps": 4, "sigma": 0.02, "bf16": True},
}
QUICK = ["ddp", "fsdp2"]
SHARDED = ("fsdp2", "zero3")
every_back_end = pytest.mark.parametrize(
    "back_end", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BACK_ENDS]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    @cache
    def run_once(back_end):
        # DeepSpeed keeps bfloat16 weights where the others cast: no float32 to measure.
        cases = {
            name: {"back_end": back_end, **case}
            for name, case in CASES.items()
            if not ("bf16" in case and back_end.startswith("zero"))
        }
        return launched(cases, tmp_path_factory.mktemp("curvature"))

    def results(back_end, name):
        ranks = run_once(back_end).result()
        for rank in ranks:
            assert_is(back_end, rank[name], processes=2)
        return [rank[name] for rank in ranks]

    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    @cache
    def measured(hvp):
        trainer = NSOTrainer(
            model=tiny_llama(),
            args=config(tmp_path_factory.mktemp("one")),
            train_dataset=token_data(48),
        )
        batches, options = training_batches(trainer, 3), {"hvp": hvp}
        trace = hessian_trace(trainer, batches, num_samples=4, **options)
        bound = pac_bayes_bound(
            trainer,
            batches,
            reference={name: 0.9 * p for name, p in tiny_llama().named_parameters()},
            sigma=0.05,
            loss_bound=10.0,
            num_samples=2,
            **options,
        )
        spectrum = hessian_spectrum(trainer, batches, num_samples=1, num_steps=5, **options)
        return {
            "trace": trace.samples,
            "values": [
                *hessian_eigenvalues(trainer, batches, k=2, **options).values,
                *hessian_eigenvalues(trainer, batches, which="smallest", **options).values,
            ],
            "nodes": spectrum.nodes,
            "stability": noise_stability(trainer, batches, sigma=0.02, num_samples=3).samples,
            "bound": bound,
        }

    return measured


def assert_agree(result, expected, relative):
    """`relative` to the figures' size: of a trace the spread of its samples."""
    spread = expected["trace"].sum(dim=1).std()
    assert (result["trace"] - expected["trace"]).abs().max() <= relative * spread
    assert result["values"] == pytest.approx(expected["values"], rel=relative)
    scale = expected["nodes"].abs().max()
    assert (result["nodes"] - expected["nodes"]).abs().max() <= relative * scale
    bound = expected["bound"]
    assert result["bound"]["distance"] == pytest.approx(bound.distance, rel=1e-6)
    assert result["bound"]["bound"] == pytest.approx(bound.bound, rel=max(relative, 1e-6))
    # Losses of ~4 in float32 (ulp 5e-7), three of them.
    assert (result["stability"] - expected["stability"]).abs().max() <= 2e-6


@every_back_end
def test_the_same_figures_as_one_process(run, one_process, back_end):
    sharded = back_end.startswith(SHARDED)
    for result in run(back_end, "auto"):
        assert result["hvp"] == ("finite_difference" if sharded else "autograd")
        if sharded:
            assert "shards the weights" in result["notes"][0]
        # Double backward: the same sums in another order. Differences of gradients: their rounding,
        # ~1e-6, over the share by which they differ, 1e-2.
        assert_agree(result, one_process(result["hvp"]), 1e-3 if sharded else 1e-5)


@every_back_end
def test_differences_agree_with_double_backward(run, one_process, back_end):
    for result in run(back_end, "differences"):
        assert result["hvp"] == "finite_difference"
        assert_agree(result, one_process("finite_difference"), 1e-3)
        values = one_process("autograd")["values"]
        assert result["values"] == pytest.approx(values, rel=2e-3)


@every_back_end
@pytest.mark.parametrize("name", ["auto", "differences"])
def test_it_leaves_all_as_it_was(run, back_end, name):
    for result in run(back_end, name):
        assert result["differ"] == []
        assert result["random_state_kept"]
        assert result["gradients"] == []


@every_back_end
def test_processes_agree_to_the_last_bit(run, back_end):
    first, second = run(back_end, "auto")
    assert torch.equal(first["trace"], second["trace"])
    assert first["values"] == second["values"]


@every_back_end
@pytest.mark.parametrize("name", ["watched", "watched, bf16"])
def test_training_is_bit_equal_with_the_callback(run, back_end, name):
    if "bf16" in name and back_end.startswith("zero"):
        return  # its weights are bfloat16: refused
    for result in run(back_end, name):
        assert [entry["step"] for entry in result["curvature with"]] == [0, 2, 4]
        assert result["losses with"] == result["losses without"]
        assert len(result["losses with"]) == 4
        for a, b in zip(result["weights with"], result["weights without"], strict=True):
            assert torch.equal(a, b)


@every_back_end
def test_mixed_precision_is_lifted(run, one_process, back_end):
    """The weights are float32, and so is what is measured."""
    if back_end.startswith("zero"):
        return  # its weights are bfloat16: refused
    for result in run(back_end, "bf16"):
        assert result["computed_in"] == "float32"  # the last pass, a measured one
        relative = 1e-3 if back_end.startswith(SHARDED) else 1e-5
        assert_agree(result, one_process(result["hvp"]), relative)

"""The many ways to shard, besides the back ends of test_matrix.py: against the same plain loop."""

import pytest

from tests.distributed.back_ends import assert_is, lora
from tests.distributed.launch import launch
from tests.older import HOLDS_GRADIENTS, IS_VERSION_4
from tests.reference import largest_difference, reference_nso, tiny_llama, token_data

pytestmark = pytest.mark.distributed

SIGMA, TOLERANCE = 0.05, 1e-6  # as in test_matrix.py
NSO = {"sigma": SIGMA, "num_perturbations": 2, "clean_weight": 0.3, "max_grad_norm": 0.5}
TWO = {**NSO, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SYNC_EACH = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def assert_equal(ranks, name, use_lora=False, tolerance=TOLERANCE, **options):
    options = {"k": 2, "lam": 0.3, **options}
    models = []
    for sigma in (SIGMA, 0.0):
        model = lora(tiny_llama()) if use_lora else tiny_llama()
        reference_nso(
            model,
            token_data(48),
            steps=3,
            global_batch=8,
            sigma=sigma,
            max_grad_norm=0.5,
            **options,
        )
        models.append(model)
    assert largest_difference(*models) > max(1e-3, 3 * tolerance)
    for rank in ranks:
        weights = rank[name]["weights"]
        differences = [
            (p - w).abs().max() for p, w in zip(models[0].parameters(), weights, strict=True)
        ]
        assert max(differences) <= tolerance


def test_fsdp2_with_its_own_checkpointing_and_synchronisation(tmp_path):
    checkpointing = {"fsdp_config": {"activation_checkpointing": True}}
    cases = {
        # Its wrappers change the names of parameters.
        "checkpointing": {
            **TWO,
            "settings": checkpointing,
            "perturb_include": [r"layers\.\d+\.mlp"],
        },
        "each": {**TWO, **SYNC_EACH},
    }
    ranks = launch({n: {"back_end": "fsdp2", **case} for n, case in cases.items()}, tmp_path)
    for rank in ranks:
        for name in cases:
            assert_is("fsdp2", rank[name], processes=2)
        reductions = [calls["reduce_scatter_base"] for _, calls, _ in rank["each"]["counted"]]
        assert reductions[0] >= 5  # in each pass
        assert len(set(reductions)) == (1 if HOLDS_GRADIENTS else 2)
        assert rank["checkpointing"]["perturbed"] == 6
    assert_equal(ranks, "each")


@pytest.mark.skipif(IS_VERSION_4, reason="not to be had in this version of transformers")
@pytest.mark.parametrize("use_lora", [False, True])
def test_models_sharded_at_load_time(use_lora, tmp_path):
    """Adapters added to such a model are whole, beside the shards."""
    tiny_llama().save_pretrained(tmp_path / "model")
    case = {**TWO, "lora": use_lora, "loaded": [str(tmp_path / "model"), {"fsdp_size": 2}]}
    ranks = launch({"run": case}, tmp_path)
    for rank in ranks:
        facts = rank["run"]
        assert (facts["backend"], facts["distributed_type"]) == ("FSDP2", "MULTI_CPU")
        assert facts["dtensors"] == len(list(tiny_llama().parameters()))
        assert facts["copies"] == 1
    assert_equal(ranks, "run", use_lora)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["Accelerate", "load time"])
def test_hybrid_sharding(way, tmp_path):
    """Two copies of the weights, each sharded over two processes."""
    tiny_llama().save_pretrained(tmp_path / "model")
    sizes = {"fsdp_size": 2, "dp_replicate_size": 2}
    sharding = (
        {"back_end": "fsdp2", "parallel": {"dp_replicate_size": 2, "dp_shard_size": 2}}
        if way == "Accelerate"
        else {"loaded": [str(tmp_path / "model"), sizes]}
    )
    one = {"per_device_train_batch_size": 2, **sharding}
    cases = {
        "one": {**NSO, **one},
        "two": {**TWO, **sharding, "per_device_train_batch_size": 1},
        "alternate": {**one, "sigma": SIGMA, "max_grad_norm": 0.5, "sign": "alternate"},
    }
    ranks = launch(cases, tmp_path, processes=4)
    for rank in ranks:
        for facts in rank.values():
            assert (facts["backend"], facts["copies"], facts["world_size"]) == ("FSDP2", 2, 4)
        elements = sum(p.numel() for p in tiny_llama().parameters())
        # The norm of n normal numbers is sqrt(n) +- 1/sqrt(2): six of these are 3.3 %.
        assert rank["one"]["norms"] == pytest.approx([SIGMA * elements**0.5] * 3, rel=0.033)
        counted = rank["one"]["counted"][-1][1]
        assert counted["reduce_scatter_base"] == 5 * counted["allreduce"]
    assert_equal(ranks, "one")
    assert_equal(ranks, "two")
    assert_equal(ranks, "alternate", k=1, lam=0, alternate_micro_batches=2)


def test_zero1_that_accumulates_in_float32(tmp_path):
    """DeepSpeed takes another optimizer for it, which steps from a float32 buffer."""
    case = {"back_end": "zero1", **TWO, "bf16": True}
    case["settings"] = {"deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}
    ranks = launch({"run": case}, tmp_path)
    for rank in ranks:
        assert_is("zero1", rank["run"], processes=2)
        assert rank["run"]["optimizer"] == "BF16_Optimizer"
    assert_equal(ranks, "run", tolerance=2**-6 * 0.1)  # see test_matrix.py; weights move by 0.1

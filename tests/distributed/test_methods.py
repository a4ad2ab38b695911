"""Every method on every back end that has it, with two processes, against its equation."""

from functools import cache

import pytest
import torch

from tests.distributed.back_ends import BACK_ENDS, assert_is, lora
from tests.distributed.launch import launch, launched
from tests.distributed.test_ddp import static_graphs
from tests.methods.equations import (
    BY_OPTIONS,
    EQUATIONS,
    OPTIONS,
    SHARED,
    TOLERANCE,
    learning_rate,
    momentum,
    reference_method,
)
from tests.methods.test_flat_lora import RHO, reference_flat_lora
from tests.older import IS_VERSION_4
from tests.reference import largest_difference, tiny_llama, token_data

pytestmark = pytest.mark.distributed

HAVING = ["ddp", "fsdp2", "fsdp2 not resharded", "fsdp2 offload"]
QUICK = ["ddp", "fsdp2"]
FLAT = ["fsdp2", "zero3"]


def case(back_end, name, accumulation):
    return {
        "back_end": back_end,
        "method": name,
        "method_kwargs": OPTIONS[name],
        **SHARED.get(name, {}),
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optim_args": f"momentum={momentum(name)}",
        "learning_rate": learning_rate(name),
        "max_grad_norm": 0.0,
    }


def cases(back_end):
    return {
        f"{name}, accumulation {accumulation}": case(back_end, name, accumulation)
        for name in BY_OPTIONS
        for accumulation in (1, 2)
    }


MORE = [
    *((name, "LoRA") for name in BY_OPTIONS),
    # What is divided by a small step, HERO's difference of gradients and ZO's of losses, drowns in
    # the roundings of bfloat16.
    *((name, "bf16") for name in BY_OPTIONS if name not in ("hero", "zo")),
]


def more_cases(back_end):
    """With adapters, and with what is computed in bfloat16."""
    given = {"LoRA": {"lora": True}, "bf16": {"bf16": True}}
    return {f"{name}, {word}": {**case(back_end, name, 2), **given[word]} for name, word in MORE}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def run(back_end, cases):
        return launched(cases(back_end), tmp_path_factory.mktemp("methods"))

    return lambda back_end, cases=cases: run(back_end, cases).result()


@cache
def reference(name, micro_batches, use_lora=False):
    model = lora(tiny_llama()) if use_lora else tiny_llama()
    losses = reference_method(
        model, name, token_data(48), steps=3, batch=8, micro_batches=micro_batches
    )
    return model, losses


@pytest.mark.parametrize(
    "back_end", [b if b in FLAT else pytest.param(b, marks=pytest.mark.slow) for b in BACK_ENDS]
)
def test_flat_lora_is_its_equation(back_end, tmp_path):
    """The base weights may be sharded, by rows or anywhere in them."""
    case = {
        "back_end": back_end,
        "method": "flat_lora",
        "method_kwargs": {"rho": RHO},
        "lora": True,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
    }
    expected, plain = lora(tiny_llama()), lora(tiny_llama())
    options = {"steps": 3, "batch": 8, "lr": 1.0}
    reference_flat_lora(expected, token_data(48), **options)
    reference_flat_lora(plain, token_data(48), rho=0.0, **options)
    assert largest_difference(plain, expected) > 100e-6
    for rank in launch({"flat": case}, tmp_path):
        assert_is(back_end, rank["flat"], processes=2)
        for p, w in zip(expected.parameters(), rank["flat"]["weights"], strict=True):
            assert (p - w).abs().max() <= 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", BY_OPTIONS)
@pytest.mark.parametrize(
    "back_end", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in HAVING]
)
def test_a_method_is_its_equation(results, back_end, name, accumulation):
    # Processes that share a copy of the weights share their micro-batch.
    micro_batches = accumulation * (2 if back_end == "ddp" else 1)
    expected, losses = reference(name, micro_batches)
    plain, _ = reference(None, micro_batches)
    assert largest_difference(plain, expected) > 20 * TOLERANCE[name]
    for rank in results(back_end):
        result = rank[f"{name}, accumulation {accumulation}"]
        assert_is(back_end, result, processes=2)
        differences = [
            (p - w).abs().max()
            for p, w in zip(expected.parameters(), result["weights"], strict=True)
        ]
        assert max(differences) <= TOLERANCE[name]
        assert result["losses"] == pytest.approx(losses, abs=2e-4)


REMEMBERING = {
    "ddp": ["async_sam", "bsam", "fsam"],
    # PyTorch does not load the state of SGD without momentum there, which bSAM asks for.
    "fsdp2": ["async_sam", "fsam"],
}


@pytest.mark.skipif(IS_VERSION_4, reason="plain training does not go on as it was either")
@pytest.mark.parametrize("back_end", REMEMBERING)
def test_what_is_remembered_is_resumed_bit_for_bit(back_end, tmp_path):
    given = {}
    for name in REMEMBERING[back_end]:
        whole = {
            **case(back_end, name, 2),
            "optim_args": f"momentum={0.0 if name == 'bsam' else 0.9}",
            "output_dir": str(tmp_path / name),
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        given[name] = whole
        given[f"{name}, resumed"] = {**whole, "resume": str(tmp_path / name / "checkpoint-2")}
    for rank in launch(given, tmp_path):
        for name in REMEMBERING[back_end]:
            whole, resumed = rank[name], rank[f"{name}, resumed"]
            assert_is(back_end, resumed, processes=2)
            assert resumed["losses"] == whole["losses"]  # the first two from the checkpoint
            for a, b in zip(whole["weights"], resumed["weights"], strict=True):
                assert torch.equal(a, b)
    parts = 2 if back_end.startswith("fsdp2") else 1  # of DDP every process has the same
    for name in REMEMBERING[back_end]:
        files = sorted((tmp_path / name / "checkpoint-2").glob("method_*.pt"))
        assert len(files) == parts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), MORE)
@pytest.mark.parametrize("back_end", HAVING)
def test_a_method_with_adapters_and_in_bfloat16(results, back_end, name, word):
    micro_batches = 4 if back_end == "ddp" else 2
    expected, _ = reference(name, micro_batches, word == "LoRA")
    before = lora(tiny_llama()) if word == "LoRA" else tiny_llama()
    moved = largest_difference(before, expected)
    # bfloat16: as in test_matrix.py, twice, for the ascent and the gradient there.
    tolerance = TOLERANCE[name] if word == "LoRA" else 2**-5 * moved
    for rank in results(back_end, more_cases):
        result = rank[f"{name}, {word}"]
        assert_is(back_end, result, processes=2)
        assert result["computed_in"] == ("bfloat16" if word == "bf16" else "float32")
        differences = [
            (p - w).abs().max()
            for p, w in zip(expected.parameters(), result["weights"], strict=True)
        ]
        assert max(differences) <= tolerance


WITHOUT = ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    "back_end",
    ["zero2", *(pytest.param(b, marks=pytest.mark.slow) for b in WITHOUT if b != "zero2")],
)
def test_a_back_end_that_adds_gradients_is_refused(back_end, tmp_path):
    refused = {
        name: {
            "experiment": "refused",
            "back_end": back_end,
            "method": name,
            "method_kwargs": OPTIONS[name],
            **SHARED.get(name, {}),
        }
        for name in EQUATIONS
    }
    for rank in launch(refused, tmp_path):
        for name in EQUATIONS:
            assert rank[name]["refused"].startswith(f"method='{name}': DeepSpeed ZeRO-")
            assert "adds every gradient to those before it" in rank[name]["refused"]


@static_graphs
def test_a_static_graph_is_refused(tmp_path):
    case = {"experiment": "refused", "method": "sam", "ddp_static_graph": True}
    for rank in launch({"sam": case}, tmp_path):
        expected = "method='sam': with a static graph every pass reduces all gradients"
        assert rank["sam"]["refused"].startswith(expected)


def test_every_back_end_is_here():
    assert set(HAVING) | {b for b in BACK_ENDS if b.startswith("zero")} == set(BACK_ENDS)

"""What every back end has to do, besides the steps of test_matrix.py: two processes each."""

from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from nso_hf.backends import alone
from nso_hf.step.rows import RowNoise, row_rms
from tests.distributed.back_ends import BACK_ENDS, assert_is
from tests.distributed.launch import launch, launched
from tests.older import HOLDS_GRADIENTS, IS_VERSION_4, LOGGED
from tests.reference import (
    causal_loss_sum,
    config,
    draw,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
    train,
    whole_noise,
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
    "relative": {**TWO, "sigma_scale": "relative"},
    "one": ONE,
    "one, plain": {"plain": True, "per_device_train_batch_size": 4},
    "two": TWO,
    "two, plain": {
        "plain": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "learning rate 0": {**TWO, "experiment": "restore", "max_steps": 10},
    "learning rate 0, bf16": {**TWO, "experiment": "restore", "max_steps": 10, "bf16": True},
    **{name: {**ONE, "experiment": "restore", **case} for name, case in FAILURES.items()},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The results of a back end's cases on each rank, all run when the first is asked for."""

    @cache
    def run_once(back_end):
        unfit = "alternate" if shares_weights(back_end) else "alternate, shared"
        cases = {
            name: {"back_end": back_end, **case} for name, case in CASES.items() if name != unfit
        }
        return launched(cases, tmp_path_factory.mktemp("back_ends"))

    def results(back_end, name):
        ranks = run_once(back_end).result()
        for rank in ranks:
            if "plain" not in name:
                assert_is(back_end, rank[name], processes=2)
        return [rank[name] for rank in ranks]

    return results


def shares_weights(back_end):
    """Whether the two processes hold one copy of the weights between them."""
    return back_end.startswith(("fsdp2", "zero3"))


QUICK = ["ddp", "fsdp2", "zero2", "zero3 persistent"]
every_back_end = pytest.mark.parametrize(
    "back_end",
    [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BACK_ENDS],
)


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


def evaluation_loss(model):
    """The mean over the tokens of all evaluation examples."""
    data = token_data(8, seed=2)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    with torch.no_grad():
        total = causal_loss_sum(model, batch)
    return (total / (batch["labels"][:, 1:] != -100).sum()).item()


@every_back_end
def test_evaluation_between_steps(run, back_end):
    """Its forward passes leave weights gathered; they must be W, and not be used again."""
    results = run(back_end, "evaluation")
    model, losses = reference()
    assert_equal(results, model)
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=LOGGED)
        assert len(result["eval_losses"]) == 3
        assert result["eval_losses"][-1] == pytest.approx(evaluation_loss(model), abs=1e-5)


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
@pytest.mark.parametrize("name", ["learning rate 0", "learning rate 0, bf16", *FAILURES])
def test_weights_are_restored_bit_for_bit(run, back_end, name):
    for result in run(back_end, name):
        assert result["differ"] == []
        assert result["elements"] > 0
        assert result["left"] == [False, False]
        # An evaluation that follows sees W: in bf16 to 2^-8 of a loss of 4.
        tolerance = 0.02 if "bf16" in name else 1e-5
        assert result["eval_loss"] == pytest.approx(evaluation_loss(tiny_llama()), abs=tolerance)
        if name in FAILURES:
            assert result["failed"]
            assert result["evaluations"] == FAILURES[name]["fail_in"]
        else:
            assert result["evaluations"] == 10 * 2 * PASSES


def communicated(result, step=2):
    """Calls and bytes of each kind of collective in one optimizer step."""
    totals = {"calls": {}, "bytes": {}}
    for number, *counts in result["counted"]:
        for total, count in zip(totals.values(), counts, strict=True):
            for kind in count if number == step else []:
                total[kind] = total.get(kind, 0) + count[kind]
    return totals


MODEL_BYTES = 4 * sum(p.numel() for p in tiny_llama().parameters())


@every_back_end
@pytest.mark.parametrize("accumulation", ["one", "two"])
def test_what_a_step_communicates(run, back_end, accumulation):
    """The table of docs/backends.md: how often plain training's reductions of gradients and
    gathers of weights are repeated."""
    kind = back_end.split()[0]
    reductions = {"ddp": 1, "zero0": 1, "zero1": 1, "zero2": PASSES, "zero3": PASSES}
    if kind == "fsdp2":  # the gradients of earlier micro-batches are held unsharded anyway
        reductions["fsdp2"] = PASSES if accumulation == "one" else 1
        if not HOLDS_GRADIENTS and accumulation == "two":  # plain training reduces twice as well
            reductions["fsdp2"] = (PASSES + 1) // 2
    gathers = {"zero1": 1, "zero2": 1, "zero3": PASSES, "fsdp2": PASSES}
    for nso, plain in zip(
        run(back_end, accumulation), run(back_end, f"{accumulation}, plain"), strict=True
    ):
        ours, theirs = communicated(nso), communicated(plain)
        assert set(ours["bytes"]) == set(theirs["bytes"])
        for collective, size in theirs["bytes"].items():
            is_gather = collective == "allgather_base"
            times = (gathers if is_gather else reductions)[kind]
            if is_gather and back_end in ("zero3 persistent", "zero3 offload"):
                # Plain training gathers small weights, here all of them, once in a step.
                assert size == MODEL_BYTES
                times *= 2 if accumulation == "two" else 1
            assert ours["bytes"][collective] == times * size
            if not is_gather:
                assert ours["calls"][collective] == times * theirs["calls"][collective]
        reduced = sum(size for name, size in theirs["bytes"].items() if name != "allgather_base")
        assert reduced >= MODEL_BYTES


RESUMED = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("back_end", RESUMED)
def test_resume_is_bit_equal(back_end, tmp_path):
    if IS_VERSION_4 and not back_end.startswith("zero"):
        pytest.skip("plain training does not go on as it was either, or not at all on CPUs")
    base = {
        "back_end": back_end,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "sigma": SIGMA,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "train_sampling_strategy": "random",
    }
    directory = str(tmp_path / "run")
    resumed = {**base, "output_dir": directory, "resume": f"{directory}/checkpoint-3"}
    ranks = launch({"whole": {**base, "output_dir": directory}, "resumed": resumed}, tmp_path)
    for rank in ranks:
        whole, again = rank["whole"], rank["resumed"]
        for result in (whole, again):
            assert_is(back_end, result, processes=2)
        assert whole["losses"][3:] == again["losses"][3:]
        assert [step for step, *_ in again["counted"]] == [3, 3, 4, 4, 5, 5]
        for a, b in zip(whole["weights"], again["weights"], strict=True):
            assert torch.equal(a, b)
        if back_end == "zero3":
            loaded = LlamaForCausalLM.from_pretrained(f"{directory}/checkpoint-6")
            for p, w in zip(loaded.parameters(), whole["weights"], strict=True):
                assert torch.equal(p, w)


@every_back_end
def test_relative_noise(run, back_end):
    """In units of the rows of W, whoever holds them, in the second micro-batch too."""
    results = run(back_end, "relative")
    model, losses = reference(relative=True)
    assert_equal(results, model)
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=LOGGED)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("back_end", ["fsdp2", "zero3"])
def test_noise_is_that_of_one_process(back_end, processes, tmp_path):
    """Weights of 50, 48, 32 and 16 rows in two and in three shards."""
    case = {"back_end": back_end, "experiment": "noise", "sigma": SIGMA}
    ranks = launch({"noise": case}, tmp_path, processes)
    model = tiny_llama()
    expected = draw(model, seed=3, step=5, j=1, sigma=0.1, distribution="normal")
    rms = row_rms(alone(model).weights(), alone(model))
    noise = RowNoise(seed=3, step=5, draw=1, std=0.1, rows=rms)
    relative = [whole_noise(p, i, noise) for i, p in enumerate(model.parameters())]
    for rank in ranks:
        assert_is(back_end, rank["noise"], processes)
        for whole, u in zip(rank["noise"]["noise"], expected, strict=True):
            assert torch.equal(whole, u)
        for whole, u in zip(rank["noise"]["relative"], relative, strict=True):
            assert torch.equal(whole, u)
    local = torch.tensor([rank["noise"]["local"] for rank in ranks])
    assert local.sum(dim=0).tolist() == [p.numel() for p in model.parameters()]
    assert (local.max(dim=0).values > local.min(dim=0).values).any() == (processes == 3)


ADAM = {"lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-3, "weight_decay": 0.1, "torch_adam": True}
WARM_UP = {
    "warmup_min_lr": 0,
    "warmup_max_lr": 1e-2,
    "warmup_num_steps": 4,
    "warmup_type": "linear",
}


@pytest.mark.parametrize("scheduler", ["DeepSpeed's", "the Trainer's"])
@pytest.mark.parametrize(
    "back_end", [pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3"]
)
def test_optimizer_and_scheduler_of_the_configuration(back_end, scheduler, tmp_path):
    settings = {"optimizer": {"type": "AdamW", "params": ADAM}}
    if scheduler == "DeepSpeed's":
        settings["scheduler"] = {"type": "WarmupLR", "params": WARM_UP}
    options = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "lr_scheduler_type": "constant_with_warmup",
        "optim": "adamw_torch",
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-3,
        "weight_decay": 0.1,
    }
    case = {"back_end": back_end, **ONE, **options, "settings": {"deepspeed": settings}}
    ranks = launch({"run": case}, tmp_path)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1
    )
    rates = ranks[0]["run"]["rates"]
    assert len(rates) == 6 and rates == sorted(rates) and len(set(rates)) >= 4
    assert rates[-1] == pytest.approx(1e-2)
    reference_nso(
        model,
        token_data(48),
        steps=6,
        global_batch=8,
        sigma=SIGMA,
        k=2,
        lam=0.3,
        max_grad_norm=0.5,
        optimizer=optimizer,
        learning_rates=rates,
    )
    for rank in ranks:
        assert_is(back_end, rank["run"], processes=2)
    # Adam divides by sqrt(v) + eps: with gradients of ~1e-3 and eps = 1e-3, roundings of 1e-8 of a
    # gradient are 1e-5 of a step of 1e-2.
    assert_equal([rank["run"] for rank in ranks], model, tolerance=2e-6)


@pytest.mark.parametrize("back_end", ["ddp", "fsdp2", "fsdp2 not resharded", "zero2", "zero3"])
def test_training_again_after_an_exception(back_end, tmp_path):
    """Gradients of the training that failed are gone. DeepSpeed cannot train twice."""
    bf16 = {"bf16": True} if back_end == "fsdp2 not resharded" else {}  # held in another place
    case = {"back_end": back_end, "experiment": "retrain", **TWO, **bf16}
    model, _ = reference()
    for rank in launch({"run": case}, tmp_path, measured=True):
        result = rank["run"]
        if back_end.startswith("zero"):
            assert "it is not held by DeepSpeed, as after evaluate()" in result["refused"]
        else:
            assert_is(back_end, result, processes=2)
            moved = largest_difference(model, tiny_llama())
            assert_equal([result], model, tolerance=2**-6 * moved if bf16 else TOLERANCE)


@pytest.mark.parametrize("back_end", ["ddp"])
def test_evaluation_before_training(back_end, tmp_path):
    """Accelerate takes a model prepared for evaluation for one prepared for training, but for older
    versions, whose Trainer prepares it again."""
    case = {"back_end": back_end, "experiment": "retrain", "first": "evaluate", **TWO}
    model, _ = reference()
    for rank in launch({"run": case}, tmp_path):
        if IS_VERSION_4:
            assert_is(back_end, rank["run"], processes=2)
            assert_equal([rank["run"]], model)
            continue
        assert "it is not wrapped in DistributedDataParallel" in rank["run"]["refused"]

"""Averages of the weights and the distance to the first ones, in two processes as in one."""

from functools import cache

import pytest
import torch

from nso_hf import NSOTrainer
from nso_hf.companions import DistancePenalty, DistanceProjection, EMACallback, SWACallback
from tests.distributed.back_ends import BACK_ENDS, assert_is
from tests.distributed.launch import launched
from tests.older import IS_VERSION_4
from tests.reference import config, largest_difference, tiny_llama, token_data

pytestmark = pytest.mark.distributed

AVERAGES = {"ema": {"decay": 0.6, "evaluate": True}, "swa": {"start": 0.5}}
DISTANCES = {"penalty": {"strength": 0.5}, "projection": {"radius": {r"layers\.\d+": 0.1}}}
OPTIONS = {
    "sigma": 0.05,
    "max_steps": 4,
    "max_grad_norm": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 0.3,
    "optim_args": "momentum=0.5",  # without a state of the optimizer FSDP2 does not resume
}
QUICK = ["ddp", "fsdp2", "zero3"]


def every(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def alone(folder, callbacks):
    """The same in one process."""
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    constant = {"optim": "sgd", "lr_scheduler_type": "constant"}
    trainer = NSOTrainer(
        model=tiny_llama(),
        args=config(folder, **OPTIONS, **sizes, **constant),
        train_dataset=token_data(48),
        eval_dataset=token_data(8, seed=2),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def difference(model, weights):
    return max((p - w).abs().max().item() for p, w in zip(model.parameters(), weights, strict=True))


def cases(back_end, folder):
    base = {"experiment": "companions", "back_end": back_end, **OPTIONS}
    distances = {name: {**base, "companions": {name: o}} for name, o in DISTANCES.items()}
    if back_end in HAVING:
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        distances["penalty, accumulated"] = {**distances["penalty"], **sizes}
    saves = {"save_strategy": "steps", "save_steps": 2, "output_dir": f"{folder}/run"}
    averages = {"averages": {**base, **saves, "companions": AVERAGES}}
    if RESUMES or back_end not in HAVING:
        resume = {"resume": f"{folder}/run/checkpoint-2"}
        averages["resumed"] = {**averages["averages"], **resume}
    averages["normalised"] = {**base, "normalised": True, "companions": AVERAGES}
    return averages | distances


HAVING = [name for name in BACK_ENDS if not name.startswith("zero")]
RESUMES = not IS_VERSION_4  # plain training does not go on as it was either, or not at all on CPUs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def run(back_end):
        folder = tmp_path_factory.mktemp("companions")
        return launched(cases(back_end, folder), folder)

    return lambda back_end: run(back_end).result()


@pytest.mark.parametrize("back_end", every(BACK_ENDS))
def test_averages_are_those_of_one_process(results, back_end, tmp_path):
    ema, swa = EMACallback(**AVERAGES["ema"]), SWACallback(**AVERAGES["swa"])
    trainer = alone(tmp_path, [ema, swa])
    logged = [e["eval_ema_loss"] for e in trainer.state.log_history if "eval_ema_loss" in e]
    for rank in results(back_end):
        whole = rank["averages"]
        assert_is(back_end, whole, processes=2)
        assert whole["differ"] == []
        # float32, four steps: as the engine's own comparison with one process.
        assert difference(trainer.model, whole["weights"]) <= 1e-6
        for callback in (ema, swa):
            average = whole["averages"][callback.name]
            with callback.averaged():
                assert difference(trainer.model, average) <= 1e-6
            assert all(map(torch.equal, average, whole["saved"].get(callback.name, average)))
            again = rank.get("resumed", whole)
            assert all(map(torch.equal, average, again["averages"][callback.name]))
        assert whole["logged"][-1] == whole["losses"]["ema"]
        # Not the same mean: the two processes' batches differ by a few of their tokens.
        assert whole["logged"] == pytest.approx(logged, rel=0.02)
        assert abs(whole["losses"]["ema"] - whole["losses"]["swa"]) > 1e-4
    assert [bool(rank["averages"]["saved"]) for rank in results(back_end)] == [True, False]


@pytest.mark.parametrize("back_end", every(BACK_ENDS))
def test_batch_norm_statistics_are_of_the_data_of_all_processes(results, back_end):
    data = token_data(48)
    batches = [torch.stack([row["input_ids"] for row in data[i : i + 4]]) for i in range(0, 48, 4)]
    for rank in results(back_end):
        found = rank["normalised"]
        assert found["differ"] == []
        for name, average in found["averages"].items():
            embedded = [average[0][ids].flatten(0, 1) for ids in batches]
            mean = torch.stack([x.mean(0) for x in embedded]).mean(0)
            var = torch.stack([x.var(0) for x in embedded]).mean(0)
            statistics = found["statistics"][name]
            # float32, embeddings of a few hundredths.
            assert (statistics["norm_of_embeddings.running_mean"] - mean).abs().max() <= 1e-6
            assert (statistics["norm_of_embeddings.running_var"] - var).abs().max() <= 1e-6


@pytest.mark.parametrize("back_end", every(HAVING))
def test_distances_are_those_of_one_process(results, back_end, tmp_path):
    kinds = {"penalty": DistancePenalty, "projection": DistanceProjection}
    plain = alone(tmp_path / "plain", [])
    for name, kind in kinds.items():
        trainer = alone(tmp_path / name, [kind(**DISTANCES[name])])
        assert largest_difference(trainer.model, plain.model) > 1e-3
        for rank in results(back_end):
            for case in (case for case in rank if case.startswith(name)):
                assert_is(back_end, rank[case], processes=2)
                assert difference(trainer.model, rank[case]["weights"]) <= 1e-6


@pytest.mark.parametrize("back_end", every([name for name in BACK_ENDS if name not in HAVING]))
def test_where_the_optimizer_has_weights_of_its_own_distances_are_refused(results, back_end):
    for rank in results(back_end):
        for name, option in (("penalty", "strength"), ("projection", "radius")):
            message = rank[name]["refused"]
            assert message.startswith(f"{option}={{") and "DeepSpeed ZeRO-" in message
            assert "steps on copies of the weights, inside the backward pass. Use Dist" in message

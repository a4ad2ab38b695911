"""The chain-of-thought recipe through `accelerate launch`, with every configuration that comes with
it: the same model as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import ENVIRONMENT, free_port, run_processes
from tests.older import IS_VERSION_4
from tests.recipes.test_cot_recipe import flags
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BACK_ENDS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDP2",
    "fsdp2_offload": "FSDP2, offloaded to the CPU",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero2_offload": "DeepSpeed ZeRO-2, offloaded to the CPU",
    "zero3": "DeepSpeed ZeRO-3",
    "zero3_offload": "DeepSpeed ZeRO-3, offloaded to the CPU",
}
SLOW = ["fsdp2_offload", "zero1", "zero2_offload", "zero3_offload"]  # they build DeepSpeed's Adam


def launch(config, folder, processes, **options):
    """The recipe's results and the weights it saved."""
    output = folder / config
    on_cpu = [str(ROOT / "tests/distributed/on_cpu.py")] if "fsdp" in config else []
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", str(free_port())),
        *on_cpu,
        str(ROOT / "recipes/cot_finetuning.py"),
        *flags(
            folder / "model",
            output,
            max_steps=2,
            learning_rate=0.01,
            adam_epsilon=1e-3,
            test_size=7,  # not a multiple of the processes
            per_device_train_batch_size=8 // processes,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            **options,
        ),
    ]
    run_processes(command)
    (weights,) = output.glob("*model.safetensors")
    return json.loads((output / "results.json").read_text()), load_file(weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch")
    save_model("llama", path / "model")
    return path


@pytest.fixture(scope="module")
def single(folder):
    results, weights = launch("single", folder, processes=1)
    assert (results["backend"], results["processes"]) == ("one process", 1)
    return results, weights


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in BACK_ENDS]
)
def test_every_configuration_gives_the_model_of_one_process(folder, single, config):
    results, weights = launch(config, folder, processes=2)
    assert (results["backend"], results["processes"]) == (BACK_ENDS[config], 2)
    assert results["steps"] == 2 and results["after"]["questions"] == 7
    partitions = list((folder / config / "checkpoint-2").glob("global_step2/zero_pp_rank_*"))
    assert bool(partitions) == config.startswith("zero")
    _, expected = single
    assert set(weights) == set(expected)
    start = load_file(folder / "model" / "model.safetensors")
    # Two steps of Adam at 0.01 with eps 1e-3: see test_back_ends.py.
    for name, weight in expected.items():
        assert (weight - weights[name]).abs().max() <= 2e-6
    assert max((expected[name] - start[name]).abs().max() for name in expected) > 1e-3
    assert sum("eval_accuracy" in entry for entry in results["log"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_adapters(folder, config, tmp_path):
    (tmp_path / "model").symlink_to(folder / "model")
    options = {"lora_r": 4, "gradient_checkpointing": "true"}
    _, expected = launch("single", tmp_path, processes=1, **options)
    results, weights = launch(config, tmp_path, processes=2, **options)
    assert results["backend"] == BACK_ENDS[config]
    assert set(weights) == set(expected) and all("lora" in name for name in weights)
    for name, weight in expected.items():
        assert (weight - weights[name]).abs().max() <= 2e-6


WAYS = {
    "FSDP on CPUs, two processes": (
        ("--config_file", "fsdp2", "--num_processes", "2"),
        {"use_cpu": "true"},
        "ACCELERATE_USE_FSDP='true': FSDP was asked for, but on this device Accelerate makes the "
        "run MULTI_CPU",
    ),
    "processes that each take themselves for the only one": (
        ("--config_file", "ddp", "--num_processes", "2"),
        {"use_cpu": "false"},
        "num_processes=1: 2 processes were launched, and each would train on the same batches",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_launching_that_is_refused_is_refused_once_and_last(folder, tmp_path, way):
    if IS_VERSION_4 and way.startswith("processes that each"):
        pytest.skip("they find each other in this version of Accelerate")
    launcher, options, message = WAYS[way]
    launcher = [
        str(ROOT / f"accelerate_configs/{word}.yaml") if word in ("fsdp2", "ddp") else word
        for word in launcher
    ]
    port = ("--main_process_port", str(free_port()))
    recipe = str(ROOT / "recipes/cot_finetuning.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *launcher, *port, recipe),
            *flags(folder / "model", tmp_path / "out", **options),
        ],
        env=os.environ | ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not (tmp_path / "out" / "results.json").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if message in line]
    assert said[0].startswith("error: ") and len(said) == 2  # by the program, and by the launcher
    assert done.stderr.strip().splitlines()[-2] == f"  traceback : {said[0]}"

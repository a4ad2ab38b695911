"""The recipe of texts through `accelerate launch`: the same classifier as in one process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import free_port, run_processes
from tests.older import IS_VERSION_4
from tests.recipes.test_text_recipe import flags, write_texts
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BACK_ENDS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2"}


def launch(config, folder, processes):
    """The recipe's results and the weights it saved."""
    output = folder / config
    on_cpu = []
    if config == "fsdp2":  # Accelerate shards a layer of BERT's and then, too late, a part of it
        on_cpu = ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]
        on_cpu += [str(ROOT / "tests/distributed/on_cpu.py")]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", str(free_port())),
        *on_cpu,
        str(ROOT / "recipes/text_classification.py"),
        *flags(
            folder / "data",
            output,
            model_name_or_path=folder / "model",
            max_steps=2,
            learning_rate=0.01,
            adam_epsilon=1e-3,
            label_noise=0.3,
            validation_size=7,  # not a multiple of the processes
            per_device_train_batch_size=8 // processes,
            eval_strategy="steps",
            eval_steps=1,
        ),
    ]
    run_processes(command)
    return json.loads((output / "results.json").read_text()), load_file(
        output / "model.safetensors"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    save_model("bert", path / "model")
    write_texts(path / "data")
    return path


@pytest.fixture(scope="module")
def single(folder):
    return launch("single", folder, processes=1)


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[] if c == "ddp" else pytest.mark.slow) for c in BACK_ENDS]
)
def test_two_processes_give_the_classifier_of_one(folder, single, config):
    if IS_VERSION_4 and config == "fsdp2":
        pytest.skip("PyTorch 2.8 ends with SIGSEGV there, on CPUs")
    results, weights = launch(config, folder, processes=2)
    expected, alone = single
    assert (results["backend"], results["processes"]) == (BACK_ENDS[config], 2)
    assert weights.keys() == alone.keys()
    # Two steps of Adam at 0.01 with eps 1e-3: see test_back_ends.py.
    for name, weight in alone.items():
        assert (weight - weights[name]).abs().max() <= 2e-6, name
    start = load_file(folder / "model" / "model.safetensors")
    moved = [(alone[name] - start[name]).abs().max() for name in alone if name in start]
    assert max(moved) > 1e-3
    for split in ("validation", "test", "memorised"):
        there, here = results[split], expected[split]
        assert there["examples"] == here["examples"] and there["accuracy"] == here["accuracy"]
    # Weights that are up to 2e-6 apart, of features below 10 in size.
    assert results["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=1e-4)

"""TRL's own scripts, by `nso sft` and its neighbours."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nso_hf.integrations import trl as door
from nso_hf.refusal import Refusal
from tests.tiny_models import save_model

pytest.importorskip("trl")

ROWS = {
    "sft": [{"prompt": f"{i} and 1 is", "completion": f" {i + 1}"} for i in range(16)],
    "dpo": [{"prompt": f"{i} and 1", "chosen": f" {i + 1}", "rejected": " x"} for i in range(16)],
    "kto": [
        {"prompt": f"{i} and 1", "completion": f" {i}", "label": i % 2 == 0} for i in range(16)
    ],
    "reward": [{"chosen": f"{i} is {i}", "rejected": f"{i} is x"} for i in range(16)],
}


@pytest.fixture
def words(tmp_path):
    """Of a command that trains a tiny Llama on the rows of a script."""
    data = tmp_path / "data"
    data.mkdir()
    save_model("llama", tmp_path / "model")

    def given(name, output="out", **options):
        text = "".join(json.dumps(row) + "\n" for row in ROWS[name])
        (data / "train.jsonl").write_text(text, encoding="utf-8")
        options = {
            "model_name_or_path": tmp_path / "model",
            "dataset_name": data,
            "output_dir": tmp_path / output,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        } | options
        return [word for key, value in options.items() for word in (f"--{key}", str(value))]

    return given


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", door.KINDS)
def test_without_noise_it_is_trls_own_training(name, words, tmp_path):
    from importlib import import_module

    import trl

    door.train(name, words(name, "nso", sigma=0))
    assert not issubclass(getattr(trl, f"{door.KINDS[name]}Trainer"), door.NSOTrainerMixin)
    script = import_module(f"trl.scripts.{name}")
    parser = script.make_parser()
    script.main(*parser.parse_args_and_config(words(name, "trl")))
    expected, found = weights(tmp_path / "trl"), weights(tmp_path / "nso")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    begun = weights(tmp_path / "model")
    assert not all(torch.equal(begun[key], found[key]) for key in begun.keys() & found.keys())


def test_a_command_trains_with_noise_in_processes_of_its_own(words, tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text(
        "sigma: 0.02\nsave_steps: 3\nmixed_precision: 'no'\n"
    )  # the last accelerate's
    given = words("sft", save_strategy="steps")
    command = [sys.executable, "-m", "nso_hf", "sft", *given, "--config", str(config), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["nso/sigma"] for entry in state["log_history"] if "loss" in entry] == [0.02] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigmaa", "0.1"], r"options='--sigmaa 0.1': unrecognized arguments: --sigmaa"),
        (["stray"], r"'stray' is no option"),
        (["--sigma", "-1"], r"sigma=-1.0: must be"),
        (["--accelerate_config", "fsdp9"], r"fsdp9.*neither a file nor a name. Choose one of ddp"),
        (["--method", "sam", "--sign", "alternate"], r"sign='alternate'"),
    ],
)
def test_wrong_options_are_refused(words, options, message):
    with pytest.raises(Refusal, match=message):
        door.launch("sft", [*words("sft"), *options])


def commands():
    page = Path(door.__file__).parents[2] / "docs" / "trl.md"
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^nso ({'|'.join(door.KINDS)}) (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "given"), commands())
def test_documented_commands_parse(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo.yaml").write_text("output_dir: runs/dpo\n")
    words = [*shlex.split(given), "--use_cpu", "true", "--bf16", "false"]
    with door.script_with_nso(name) as script:
        *_, others = door.parsed(script, name, words)
    assert door.launch_options(name, others, words).training_script_args == [name, *words]


@pytest.mark.parametrize("name", ["fsdp2", "single_gpu"])
def test_configurations_of_accelerate_by_name(name):
    found = door.launch_options("sft", ["--accelerate_config", name], ["--sigma", "0.1"])
    assert found.config_file.endswith(f"{name}.yaml")
    assert found.training_script == "nso_hf" and found.module
    assert found.training_script_args == ["sft", "--sigma", "0.1"]

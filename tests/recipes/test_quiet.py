"""What a run says that is not its own: nothing."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import nso_hf
from tests.recipes.test_cot_recipe import flags
from tests.tiny_models import save_model

ROOT = Path(__file__).parents[2]
OF_OTHERS = re.compile(r"warn|deprecat|\[transformers\]", re.I)


def noise(command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}  # of DeepSpeed
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = re.split(r"[\r\n]", done.stdout + done.stderr)
    return [line for line in lines if OF_OTHERS.search(line)]


SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("code", [c for c in SNIPPETS if "train()" in c], ids=lambda c: c[-20:])
def test_the_snippets_of_the_readme(tmp_path, code):
    assert noise(["-c", code], tmp_path) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_recipe_with_adapters(tmp_path, kind):
    model = save_model(kind, tmp_path / "model")
    options = {"lora_r": 4, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    command = [str(ROOT / "recipes" / "cot_finetuning.py")]
    assert noise([*command, *flags(model, tmp_path / "out", **options)], tmp_path) == []


def test_the_version_is_that_of_the_package():
    assert nso_hf.__version__ == version("nso_hf")

"""What is installed is usable where no checkout is near."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

import nso_hf
from tests.tiny_models import save_model

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": os.environ["PATH"],
    "HOME": os.environ.get("HOME", "/"),
}


def sources():
    """What git knows, or what a source distribution holds."""
    if (ROOT / ".git").exists():
        files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
        return files.decode().split()
    left_out = re.compile(r"__pycache__|\.egg-info|^\.|^(runs|build|dist)$")
    return [
        path.relative_to(ROOT)
        for path in ROOT.rglob("*")
        if not any(left_out.search(part) for part in path.relative_to(ROOT).parts)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that `python -m build` fills, from a copy of the sources."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in sources():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(output),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The programs of an environment that has the wheel, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # no .pth file of there
    wheel = next(built.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    command = [*pip, "install", "--no-deps", "-q", str(wheel)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    return folder / "bin"


def run(command, folder, **environment):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_has_what_is_used(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    for name in [
        "nso_hf/py.typed",
        "nso_hf/accelerate_configs/fsdp2.yaml",
        "nso_hf/recipes/cot_finetuning.py",
        "nso_hf/recipes/configs/gsm8k.yaml",
        "nso_hf/tasks/clip/model_configs/vit-tiny-64.json",
    ]:
        assert name in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"nso_hf"}


def test_the_source_has_its_tests(built):
    archive = next(built.glob("*.tar.gz"))
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    needed = {str(name) for name in sources() if (ROOT / name).is_file()}
    assert {name for name in needed if name.startswith(("tests/", "recipes/", "docs/"))} <= names
    assert {"Makefile", "README.md", "pyproject.toml", "CHANGELOG.md"} <= names


def test_the_command_is_there_at_once(installed, tmp_path):
    started = time.process_time()
    shown = run([installed / "nso", "--help"], tmp_path)
    assert shown.returncode == 0 and "curvature" in shown.stdout
    modules = run(
        [installed / "python", "-c", "import sys, nso_hf.__main__; print(*sys.modules)"], tmp_path
    ).stdout.split()
    assert "torch" not in modules and "transformers" not in modules
    assert time.process_time() - started < 60
    assert run([installed / "nso", "--version"], tmp_path).stdout == f"{nso_hf.__version__}\n"
    path = Path(run([installed / "nso", "accelerate-config", "fsdp2"], tmp_path).stdout.strip())
    assert path.read_bytes() == (ROOT / "accelerate_configs" / "fsdp2.yaml").read_bytes()
    assert ROOT not in path.parents
    for words in (["nothing"], ["accelerate-config", "fsdp3"]):
        refused = run([installed / "nso", *words], tmp_path)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ")
        assert "Choose one of" in refused.stderr and "Traceback" not in refused.stderr


def test_a_recipe_runs_from_its_shipped_configuration(installed, tmp_path):
    save_model("gpt2", tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(
        "\n".join(
            '{"question": "%d + 1 =", "rationale": "count", "answer": "%d"}' % (i, i + 1)
            for i in range(20)
        )
    )
    options = {
        "--config": "gsm8k",
        "--dataset": "train.jsonl",
        "--model_name_or_path": "model",
        "--output_dir": "out",
        "--max_steps": "2",
        "--validation_size": "4",
        "--test_size": "4",
        "--max_new_tokens": "4",
        "--lora_target_modules": "c_attn",
        "--use_cpu": "true",
    }
    words = [word for option in options.items() for word in option]
    done = run([installed / "nso", "cot", *words], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "results.json").exists()
    module = [installed / "python", "-m", "nso_hf.recipes.cot_finetuning", "--help"]
    assert "--config FILE" in run(module, tmp_path).stdout
    listed = run([installed / "nso", "cot", "--config", "gsm8"], tmp_path)
    assert "config='gsm8': no such file" in listed.stderr
    assert "gsm8k" in run([installed / "nso", "cot", "--help"], tmp_path).stdout


@pytest.mark.slow
def test_editors_and_mypy_see_the_parameters(tmp_path):
    (tmp_path / "right.py").write_text(
        "from nso_hf import NSOConfig, NSOTrainer\n"
        "from transformers import PreTrainedModel\n"
        "def train(model: PreTrainedModel) -> None:\n"
        "    NSOTrainer(model=model, args=NSOConfig(output_dir='out', sigma=0.1)).train()\n"
    )
    (tmp_path / "wrong.py").write_text(
        "from nso_hf import NSOConfig, NSOTrainer\n"
        "NSOTrainer(modle=None)\n"
        "NSOConfig(output_dir='out', sgima=0.1)\n"
        "NSOConfig(output_dir='out', num_perturbations='two')\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "/dev/null",
        "--follow-imports=silent",
    ]
    checked = {
        name: subprocess.run(
            [*command, str(tmp_path / f"{name}.py")], capture_output=True, text=True, cwd=ROOT
        ).stdout
        for name in ("right", "wrong")
    }
    assert "Success" in checked["right"], checked["right"]
    assert 'Unexpected keyword argument "modle"' in checked["wrong"]
    assert 'Unexpected keyword argument "sgima"' in checked["wrong"]
    assert 'Argument "num_perturbations"' in checked["wrong"]

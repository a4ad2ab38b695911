"""Every wrong input is refused when the options, the trainer or the recipe are built: option,
value, rule, cure."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nso_hf.refusal import needs
from tests.older import IS_VERSION_4
from tests.refusals import SECTIONS, message

DOCUMENTED = (Path(__file__).parent.parent / "docs" / "refusals.md").read_text()


CASES = {name: case for cases in SECTIONS.values() for name, case in cases.items()}
if IS_VERSION_4:
    del CASES["tensor parallelism at load time"]  # not to be had
    del CASES["name that open_clip takes for SigLIP's"]  # its version then has another reason


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_gets_the_documented_message(name):
    text = message(CASES[name])
    assert f"| {name} | `{text.replace('|', '¦')}` |" in DOCUMENTED
    option, _, rest = text.partition("=")
    assert re.fullmatch(r"[\w*.]+", option), "it begins with the option and its value"
    assert not re.search(r" [.,](\s|$)", text), "a part of it is missing"
    rule_and_cure = rest.partition(": ")[2]
    assert rule_and_cure.endswith(".") and ". " in rule_and_cure, "a rule, then a cure"


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    needs("nso_hf.tasks.clip", "clip", "torch", "numpy")
    message = re.escape("nso_hf.tasks.clip needs no_such: run pip install 'nso_hf[clip]'")
    with pytest.raises(ImportError, match=message):
        needs("nso_hf.tasks.clip", "clip", "torch", "no_such")


@pytest.mark.parametrize("command", ["robustness", "curvature"])
@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_command_without_a_package_ends_in_a_line(command, package):
    program = f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'nso'\n"
    program += "from nso_hf.__main__ import main; main()"
    words = [sys.executable, "-c", program, command, "model", "--data", "texts.jsonl"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 1
    line = f"error: nso {command} needs {package}: run pip install 'nso_hf[recipes]'"
    assert ended.stderr.splitlines()[-1] == line and "Traceback" not in ended.stderr


@pytest.mark.parametrize("package", ["peft", "reasoning_gym"])
def test_a_part_without_its_package_names_it(package, tmp_path, monkeypatch):
    from nso_hf.curvature.loading import load_checkpoint
    from nso_hf.tasks.reasoning.generated import generate_examples

    monkeypatch.setattr("nso_hf.refusal.find_spec", lambda name: None if name == package else name)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ImportError, match=rf"needs {package}: run pip install 'nso_hf\[recipes\]'"):
        if package == "peft":
            load_checkpoint(str(tmp_path))
        else:
            generate_examples("chain_sum", 2, 0)


def test_nothing_is_written_before_a_refusal(tmp_path):
    from nso_hf.refusal import Refusal
    from tests.refusals import recipe

    with pytest.raises(Refusal):
        recipe("--sigma", "-1")(tmp_path)
    assert not (tmp_path / "out").exists()
    kept = '{"kept": true}'
    with pytest.raises(Refusal):
        recipe(write={"out/results.json": kept.replace("{", "{").replace("}", "}")})(tmp_path)
    assert (tmp_path / "out" / "results.json").read_text() == kept


@pytest.mark.parametrize(
    ("options", "multiple"),
    [((3, 1, 1), 2), ((2, 1, 2), 4), ((1, 3, 1), 2), ((1, 2, 2), 2), ((5, 4, 3), 3)],
)
def test_the_cure_for_an_odd_count_is_a_number_that_works(options, multiple):
    from nso_hf import NSOArguments

    accumulation, replicas, k = options
    method = NSOArguments(sign="alternate", num_perturbations=k).chosen_method()
    with pytest.raises(ValueError, match=f"to a multiple of {multiple}, or use sign='both'"):
        method.check_micro_batches(accumulation, replicas)
    method.check_micro_batches(multiple, replicas)


def test_trainers_of_trl_that_generate_are_refused_and_the_others_are_not():
    trl = pytest.importorskip("trl")
    experimental = [
        ("gkd", "GKDTrainer"),
        ("gold", "GOLDTrainer"),
        ("online_dpo", "OnlineDPOTrainer"),
    ]

    from nso_hf.step.generation import check_generates_nothing

    generating = [trl.GRPOTrainer, trl.RLOOTrainer]
    for folder, name in experimental:
        place = f"trl.experimental.{folder}"  # or where it was before, if it was
        holder = importlib.import_module(place) if importlib.util.find_spec(place) else trl
        generating += [getattr(holder, name)] if hasattr(holder, name) else []
    assert len(generating) >= 4
    for trainer in generating:
        for kind in (trainer, type("Mine", (trainer,), {})):  # whatever it is called
            with pytest.raises(ValueError, match=r"it generates or counts its calls inside a"):
                check_generates_nothing(kind)
    for trainer in (trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer):
        check_generates_nothing(trainer)

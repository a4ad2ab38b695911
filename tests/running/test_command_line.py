"""Options from YAML files have the types of the dataclasses; a program ends in one line."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from nso_hf import NSOConfig
from nso_hf.running.command_line import RecipeParser


@dataclass
class Options:
    count: int = 1
    limit: int | None = 3
    rate: float = 0.0
    flag: bool = False
    maybe: bool | None = None
    text: str = "t"
    label: str | None = "l"
    names: list[str] | None = None
    sizes: list[int] | None = None
    settings: dict[str, Any] | str | None = field(default=None)


def parsed(tmp_path, text, *flags):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    parser = RecipeParser([Options, NSOConfig])
    words = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")]
    return parser.parse([*words, "--use_cpu", "true", *flags])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("count: 7", 7),
        ("limit: null", None),
        ("limit:", None),
        ("rate: 1e-4", 1e-4),
        ("rate: '1e-4'", 1e-4),
        ("rate: 2", 2.0),
        ("flag: yes", True),
        ("flag: 'off'", None),
        ("maybe: no", False),
        ("text: no", "no"),
        ("text: 007", "007"),
        ("text: '2.5'", "2.5"),
        ("text: 北京", "北京"),
        ("label: ~", None),
        ("names: [q, no, 1]", ["q", "no", "1"]),
        ("sizes: [1, 2]", [1, 2]),
        ("settings: {low: 1e-5, deep: {mean: true}}", {"low": 1e-5, "deep": {"mean": True}}),
    ],
)
def test_a_value_is_read_as_the_type_it_is_for(tmp_path, line, value):
    name = line.partition(":")[0]
    if line == "flag: 'off'":  # a word that the command line does not take either
        with pytest.raises(ValueError, match="flag='off': must be true or false"):
            parsed(tmp_path, line)
        return
    options, _ = parsed(tmp_path, line)
    got = getattr(options, name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 2.5", "count='2.5': must be an integer"),
        ("count: true", "count='true': must be an integer"),
        ("count:", "count=None: must be an integer"),
        ("count: [1]", r"count=\[1\]: must be an integer"),
        ("rate: fast", "rate='fast': must be a number"),
        ("flag: 2", "flag='2': must be true or false"),
        ("text: {a: 1}", r"text={'a': 1}: must be a single value"),
        ("names: q", r"names='q': must be a list. Write it as \[q\]"),
        ("sizes: [1, 2.5]", "sizes='2.5': must be an integer"),
        ("names: [[a]]", "names=.*: must be a list of single values"),
        ("settings: [1]", r"settings=\[1\]: must be a single value"),
        ("max_steps: 1.5", "max_steps='1.5': must be an integer"),
        ("save_strategy: often", "save_strategy='often': must be one of no, steps, epoch, best"),
        ("count: 1\ncount: 2", "config='.*': it has count twice"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, text)


def test_training_options_in_yaml(tmp_path):
    text = "eval_strategy: no\nreport_to: [none]\nlearning_rate: 3e-4\nmax_steps: 5\n"
    text += "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 5e-1}\nsigma: 1\n"
    _, args = parsed(tmp_path, text, "--max_steps", "6")
    assert (args.learning_rate, args.max_steps, args.sigma) == (3e-4, 6, 1.0)
    assert args.eval_strategy == "no" and args.lr_scheduler_kwargs == {"num_cycles": 0.5}


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes("text: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"config='.*': not UTF-8"):
        RecipeParser([Options]).parse(["--config", str(tmp_path / "c.yaml")])


PROGRAM = """
import sys
from nso_hf.running.program import run
from nso_hf.refusal import refusal
def main():
    print("北京")
    if "interrupted" in sys.argv:
        raise KeyboardInterrupt
    raise refusal("rate", "é", "too high", "Lower it")
run(main)
"""


def ended(tmp_path, *words, **environment):
    base = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, env=base | environment, timeout=100)


def test_a_program_ends_in_one_line_on_any_terminal(tmp_path):
    done = ended(tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and done.stdout == b"\\u5317\\u4eac\n"
    assert done.stderr == b"error: rate='\\xe9': too high. Lower it.\n"
    done = ended(tmp_path, "interrupted", PYTHONIOENCODING="utf-8")
    assert done.returncode == 1 and done.stderr == b"\nInterrupted.\n"


def test_the_launcher_is_told_why_a_process_ended(tmp_path):
    """In the form that torchrun prints below its own stack."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    ended(tmp_path, RANK="0", TORCHELASTIC_ERROR_FILE=str(file))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message == "error: rate='é': too high. Lower it."
    assert json.loads(file.read_text())["message"] == failure.message

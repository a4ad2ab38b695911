"""The shape that keeps the code small: one reader of the back end, imports in one direction, honest
refusals."""

import ast
import re
from pathlib import Path

import pytest
from accelerate.utils import DistributedType
from torch import nn

import nso_hf
from nso_hf.backends import check, select
from tests.refusals import accelerator

PACKAGE = Path(nso_hf.__file__).parent
ORDER = [
    "refusal",
    "backends",
    "storage",
    "edits",
    "weighting",
    "generators",
    "generation",
    "perturbation",
    "noise",
    "methods",
    "arguments",
    "selection",
    "side_effects",
    "trainer",
]


def test_back_end_words_stay_in_backends():
    words = re.compile(
        # But for the name of an option of the Trainer's.
        r"distributed_type|DistributedType|deepspeed|ds_tensor|DTensor|FSDP|DDP(?!_find_unused)",
        re.I,
    )
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "backends":
            found = words.search(path.read_text())
            assert not found, f"{path.name} says {found.group()}"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nso_hf."):
            yield node.module.split(".")[1]


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported in imports_of(path):
            if (
                name in ORDER
                and imported != name
                and not (name == "methods" and imported == "arguments")
            ):
                assert ORDER.index(imported) < ORDER.index(name), f"{path.name} imports {imported}"
            if name == "curvature":
                below = ["refusal", "backends", "perturbation", "noise", "side_effects"]
                below += ["storage", "figures", "generators", "tables", name]
                if path.name == "__main__.py":
                    below.append("command_line")
                assert imported in below, f"{path.name} imports {imported}"
            if name in ("reasoning", "checkpoints", "plots", "config_file"):
                assert imported in ("figures", "plots", "reasoning", "refusal", "tables")
            if name == "command_line":
                assert imported in ("arguments", "config_file", "refusal")
            if name == "clip":
                below = ["backends", "clip", "figures", "plots", "refusal", "side_effects"]
                below.append("tables")
                assert imported in below, f"{path.name} imports {imported}"


def test_public_names_are_sorted_and_there():
    assert nso_hf.__all__ == sorted(nso_hf.__all__)
    assert all(hasattr(nso_hf, name) for name in nso_hf.__all__)


@pytest.mark.parametrize("kind", list(DistributedType))
def test_every_kind_of_run_is_either_known_or_refused(kind):
    known = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
    if kind == DistributedType.NO or kind.value.startswith("MULTI_"):
        known[kind] = "Replicated"
    if kind in known:
        backend = select(accelerator(kind), nn.Linear(2, 2))
        assert type(backend).__name__ == known[kind]
        assert backend.num_processes == 2
        shared = kind == DistributedType.FSDP
        assert (backend.copy, backend.num_copies) == ((0, 1) if shared else (1, 2))
    else:
        message = f"distributed_type='{kind.value}': NSO runs in one process, under Distributed"
        with pytest.raises(ValueError, match=message):
            check(accelerator(kind))


def test_one_copy_of_the_weights_is_at_one_point():
    """Whatever its stage, DeepSpeed holds whole copies, until it partitions the weights."""
    for stage, copies in {0: 2, 1: 2, 2: 2, 3: 1}.items():
        run = accelerator(DistributedType.DEEPSPEED, deepspeed={"stage": stage})
        assert select(run, nn.Linear(2, 2)).num_copies == copies


def _body(node):
    body = getattr(node, "body", [])
    return body if isinstance(body, list) else []


def test_no_string_stands_alone():
    """The second line of a message without parentheses around it would be lost without a word."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for statement in (s for part in ast.walk(node) for s in _body(part)[1:]):
                    is_string = isinstance(statement, ast.Expr) and isinstance(
                        statement.value, (ast.Constant, ast.JoinedStr)
                    )
                    assert not is_string, f"{path.name}:{statement.lineno}"

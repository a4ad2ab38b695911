"""The shape that keeps the code small: one reader of the back end, imports in one direction, honest
refusals."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.utils import DistributedType
from torch import nn

import nso_hf
from nso_hf import moved
from nso_hf.backends import check, select
from tests.refusals import accelerator

PACKAGE = Path(nso_hf.__file__).parent
ENGINE = ["refusal", "backends", "step", "methods", "arguments", "automatic_sigma", "trainer"]
"""Each imports only those before it, and what finds a sigma the measures of curvature too."""
BESIDE = {
    "running": {"refusal", "backends", "arguments"},
    "companions": set(ENGINE),
    "curvature": {"refusal", "backends", "step", "running"},
    "robustness": {"refusal", "curvature", "running", "tasks"},
    "deep_lora": {"refusal"},
    "integrations": {*ENGINE, "running"},
    "tasks": {*ENGINE, "running", "companions", "curvature", "robustness", "deep_lora"},
}
"""And what stands beside the engine imports only these."""


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


def import_graph():
    """Module -> the modules of this package that it imports, wherever in its text."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in modules.items():
        graph[name] = found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nso_hf"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                found |= inner or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & modules.keys()
    return graph


def wing(module):
    """The part of the house that a module is in; "" for the package itself."""
    return f"{module}.".split(".")[1]


def reached_from(modules, graph):
    reached, waiting = set(), list(modules)
    while waiting:
        for imported in graph[waiting.pop()] - reached:
            reached.add(imported)
            waiting.append(imported)
    return reached


def test_imports_go_one_way():
    graph = import_graph()
    wings = {wing(module) for module in graph}
    assert wings == {*ENGINE, *BESIDE, "__main__", "moved", ""}, "say what a new wing may import"
    allowed = {name: set(ENGINE[:place]) for place, name in enumerate(ENGINE)} | BESIDE
    allowed |= {"moved": set(), "": {"moved", "arguments", "trainer"}}
    allowed["automatic_sigma"].add("curvature")
    allowed["trainer"].add("curvature")
    allowed["__main__"] = {"", "running"}
    for module, imports in graph.items():
        for imported in imports:
            name = wing(module)
            assert wing(imported) in {name, *allowed[name]}, f"{module} imports {imported}"


def test_no_circle_of_imports():
    graph = import_graph()
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    for module in graph.keys() - packages:
        assert module not in reached_from([module], graph), f"{module} imports itself"


def test_curvature_knows_nothing_of_training_by_a_method():
    graph = import_graph()
    modules = [module for module in graph if wing(module) == "curvature"]
    reached = {wing(module) for module in reached_from(modules, graph)}
    assert reached == {"curvature", *BESIDE["curvature"]}


def test_what_survives_knows_nothing_of_training_and_tasks_only_by_its_command():
    graph = import_graph()
    modules = [module for module in graph if wing(module) == "robustness"]
    reached = {wing(module) for module in reached_from(modules, graph)}
    assert reached == {"robustness", *BESIDE["robustness"], "step"}
    importing = {m for m in modules for other in graph[m] if wing(other) == "tasks"}
    assert importing == {"nso_hf.robustness.__main__", "nso_hf.robustness.clip_models"}


def test_modules_are_found_by_their_earlier_names():
    for old, new in moved.MOVED.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
            sys.modules.pop(old, None)
            module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__name__ == module.__spec__.name == new
    with pytest.warns(DeprecationWarning):
        pairs = importlib.import_module("nso_hf.clip.pairs")
    assert pairs is importlib.import_module("nso_hf.tasks.clip.pairs")
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match=r"tasks\.clip\.none"):
        importlib.import_module("nso_hf.clip.none")


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


def test_pictures_leave_matplotlib_as_found():
    """A back end chosen for the whole process would blank the pictures of a notebook."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"pyplot|matplotlib\.use", path.read_text()), path.name


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


def test_what_is_installed_is_what_is_there():
    """setuptools cannot look for packages and take some from elsewhere: so they are listed."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
    }
    elsewhere = settings["package-dir"]
    assert settings["packages"] == sorted(found | elsewhere.keys())
    assert all((PACKAGE.parent / folder).is_dir() for folder in elsewhere.values())

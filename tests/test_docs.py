"""Every Python snippet of the documentation runs; every recipe command in it parses."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from nso_hf.__main__ import COMMANDS
from nso_hf.methods import METHODS
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.comparison.execution import arguments

ROOT = Path(__file__).parent.parent
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


PYTHON = [(page.name, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize(("page", "number", "code"), PYTHON, ids=lambda v: str(v)[:20])
def test_python_snippets_run(page, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS)
    try:
        namespace = {"__name__": f"{page}_{number}"}
        exec(compile(code, f"{page}:{number}", "exec"), namespace)
        if "trainer" in namespace:
            logs = namespace["trainer"].state.log_history
            assert all(log["nso/perturbation_norm"] > 0 for log in logs if "loss" in log)
        if "Smoothed" in namespace:
            _trains_as_documented(tmp_path)
    finally:
        METHODS.clear()
        METHODS.update(before)


def _trains_as_documented(folder):
    from tests.reference import config, largest_difference, tiny_llama, token_data, train

    models = [tiny_llama(), tiny_llama()]
    train(models[0], token_data(12), config(folder, method="smoothed", sigma=0.05))
    options = {"two_sided": False, "clean_weight": 0.5}
    train(models[1], token_data(12), config(folder, sigma=0.05, **options))
    assert largest_difference(*models) == 0


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    names = "|".join(path.stem for path in sorted((ROOT / "recipes").glob("*_*.py")))
    scripts = rf"recipes/(?:{names})\.py [^`\n]*"
    return sorted(set(re.findall(scripts, text)))


@pytest.mark.parametrize("command", commands())
def test_recipe_commands_parse(command, tmp_path, monkeypatch):
    (tmp_path / "names.json").write_text("{}")
    monkeypatch.chdir(ROOT)
    script, *words = shlex.split(command.replace("names.json", str(tmp_path / "names.json")))
    if words == ["--help"]:
        return
    recipe = import_module(script.removesuffix(".py").replace("/", "."))
    RecipeParser(recipe.OPTIONS).parse([*words, "--use_cpu", "true", "--bf16", "false"])


def test_the_example_of_a_comparison_is_right(tmp_path):
    from nso_hf.running.comparison.description import read_comparison
    from nso_hf.running.comparison.plan import cells, first_of_each, missing

    (example,) = blocks(ROOT / "docs" / "compare.md", "yaml")
    (tmp_path / "digits.yaml").write_text(example)
    found = read_comparison(tmp_path / "digits.yaml", Path)
    runs = len(missing(cells(found, {}), {})) + sum(cell.unknown for cell in cells(found, {}))
    # Of each setting and method 6 trials and 5 seeds; the pace is that of plain's trials.
    assert runs == 2 * 6 * (6 + 5)
    script = COMMANDS.get(found.recipe.name, ("",))[0].rpartition(".")[2]
    if script:
        recipe = import_module(f"recipes.{script}")
        for run in first_of_each(found):
            words = arguments(run, recipe, tmp_path / "out")
            RecipeParser(recipe.OPTIONS).parse([*words, "--use_cpu", "true"])


def test_pages_link_to_what_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.M)

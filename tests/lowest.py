"""The lowest versions that pyproject.toml allows, printed as constraints for pip."""

import re
import tomllib
from pathlib import Path


def lowest() -> dict[str, str]:
    """Package -> the version that its `>=` names, of the library and of its extras."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds: dict[str, str] = {}
    for requirement in (requirement for group in groups for requirement in group):
        bound = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([^,;]+)(,.*)?", requirement)
        if bound is not None:
            name, version, _ = bound.groups()
            assert bounds.setdefault(name, version) == version, f"{name} has two lower bounds"
    return bounds


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest().items())))

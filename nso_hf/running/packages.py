"""Models that an installed Python package carries."""

from importlib.util import find_spec
from pathlib import Path

from nso_hf.refusal import refusal

_SCHEME = "package:"
_CURE = "Write package:NAME, or package:NAME/FOLDER"


def in_package(path: str, option: str) -> str:
    """The folder that 'package:NAME' or 'package:NAME/FOLDER' means; another path as it is.

    Raises:
        ValueError: no such package is installed.
    """
    if not path.startswith(_SCHEME):
        return path
    name, _, folder = path.removeprefix(_SCHEME).partition("/")
    package = name.replace("-", "_")  # as pip calls it
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        named = package.isidentifier()
        cure = f"Run pip install --no-deps {package.replace('_', '-')}" if named else _CURE
        raise refusal(option, path, f"no package {name!r}", cure)
    return str(Path(spec.submodule_search_locations[0]) / folder)

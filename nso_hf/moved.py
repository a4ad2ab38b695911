"""Modules under the names they had before 0.2, for programs that import them so."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FOLDERS = {
    "step": "edits generation generators noise perturbation selection side_effects storage "
    "weighting",
    "running": "checkpoints command_line config_file figures plots readiness recorded_options "
    "tables",
    "tasks": "clip reasoning",
}
MOVED = {
    f"nso_hf.{name}": f"nso_hf.{folder}.{name}"
    for folder, names in _FOLDERS.items()
    for name in names.split()
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its earlier name, and loads it by its own: both are one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, name, rest = (*fullname.split(".", 2), "", "")[:3]
        moved = MOVED.get(f"{package}.{name}")
        return ModuleSpec(fullname, self, origin=f"{moved}.{rest}".strip(".")) if moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {spec.origin}", DeprecationWarning, stacklevel=2)
        module = import_module(str(spec.origin))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # its own, which was replaced meanwhile


def install() -> None:
    """Let the earlier names be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())  # before that which finds files in a moved folder

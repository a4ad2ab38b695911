"""What `accelerate launch` is told."""

import os
from pathlib import Path

_FOLDER = "accelerate_configs"  # in the package where it is installed, beside it in a checkout


def accelerate_configs() -> dict[str, Path]:
    """The configurations of accelerate that come with the library, by name."""
    package = Path(__file__).parents[1]
    folder = next(f for f in (package, package.parent) if (f / _FOLDER).is_dir()) / _FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def is_launched() -> bool:
    """Whether this is a process of `accelerate launch` or torchrun."""
    return not {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"}.isdisjoint(os.environ)

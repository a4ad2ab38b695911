"""Checkpoints of open_clip among those of other libraries. None of the packages of the extra is
needed to tell them apart."""

from pathlib import Path

CONFIG_NAME = "open_clip_config.json"
_SCHEMES = ("local-dir:", "hf-hub:")


def is_of_open_clip(checkpoint: str) -> bool:
    """Whether it is a folder that open_clip loads, or local-dir:FOLDER or hf-hub:ID."""
    return checkpoint.startswith(_SCHEMES) or (Path(checkpoint) / CONFIG_NAME).is_file()


def name_of(checkpoint: str) -> str:
    """What open_clip calls the model in it."""
    return checkpoint if checkpoint.startswith(_SCHEMES) else f"local-dir:{checkpoint}"

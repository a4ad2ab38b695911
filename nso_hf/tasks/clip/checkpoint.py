"""Checkpoints of CLIP models among others. None of the packages of the extra is needed to tell them
apart."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from nso_hf.running.packages import in_package

CONFIG_NAME = "open_clip_config.json"
_SCHEMES = ("local-dir:", "hf-hub:")


def is_of_open_clip(checkpoint: str) -> bool:
    """Whether it is a folder that open_clip loads, or local-dir:FOLDER or hf-hub:ID."""
    return checkpoint.startswith(_SCHEMES) or (Path(checkpoint) / CONFIG_NAME).is_file()


def is_of_transformers(checkpoint: str) -> bool:
    """Whether it is a folder of a `CLIPModel`, or the id of one on the hub."""
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError):  # whoever loads it says what is wrong with it
        return False
    return bool(config.model_type == "clip")


def is_clip(checkpoint: str) -> bool:
    """Whether it is one of the two, or package:NAME of one."""
    checkpoint = in_package(checkpoint, "checkpoint")
    return is_of_open_clip(checkpoint) or is_of_transformers(checkpoint)


def name_of(checkpoint: str) -> str:
    """What open_clip calls the model in it."""
    return checkpoint if checkpoint.startswith(_SCHEMES) else f"local-dir:{checkpoint}"

"""What checkpoints hold beside the Trainer's own: a file for each part of each thing kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from nso_hf.refusal import refusal


class Keeps(Protocol):
    """What has a state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


def save(kept: Mapping[str, Keeps], checkpoint: str, part: int) -> None:
    """Write the state of each, of one part of the weights."""
    for name, each in kept.items():
        torch.save(each.state_dict(), _file(checkpoint, name, part))


def load(kept: Mapping[str, Keeps], checkpoint: str, part: int) -> None:
    """Read what `save` wrote.

    Raises:
        ValueError: it did not.
    """
    for name, each in kept.items():
        file = _file(checkpoint, name, part)
        if not file.exists():
            rule = f"it has no {file.name}, which the training's {name} goes on from"
            cure = f"Resume with the {name} and the number of processes that it was written by"
            raise refusal("resume_from_checkpoint", checkpoint, rule, cure)
        each.load_state_dict(torch.load(file, map_location="cpu"))


def load_renamed(model: nn.Module, folder: str, missing: Sequence[str]) -> None:
    """Load the weights of a folder once more, whose files have other names than the model: those of
    an earlier version of transformers, which `from_pretrained` translates and its Trainer does not.

    Raises:
        ValueError: nothing translates them.
    """
    if isinstance(model, PreTrainedModel):
        loaded = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
        return
    rule = f"it has other weights than the model, and no {missing[0]}, which would stay untrained"
    raise refusal("resume_from_checkpoint", folder, rule, "Resume with the model that wrote it")


def _file(checkpoint: str, name: str, part: int) -> Path:
    return Path(checkpoint) / f"{name}_{part}.pt"

"""Finding the checkpoint to go on from."""

import json
from pathlib import Path


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest `checkpoint-N` in `folder` that was written to its end, if any.

    The Trainer writes trainer_state.json last: a run that was killed while saving leaves a folder
    without it, or with a part of it.
    """
    steps = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and _is_json(path / "trainer_state.json"):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True

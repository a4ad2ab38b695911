"""Finding the checkpoint to go on from."""

import json
from pathlib import Path


def last_complete_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The latest `checkpoint-N` in `folder` that `processes` processes wrote to its end, if any.

    The first process writes trainer_state.json last, and each process its random state: a run that
    was killed while saving leaves a folder without one of them, or with a part of it.
    """
    steps = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        states = [path / f"rng_state_{rank}.pth" for rank in range(processes)]
        written = processes == 1 or all(state.exists() for state in states)
        if number.isdecimal() and written and _is_json(path / "trainer_state.json"):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True

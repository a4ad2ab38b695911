"""Finding the checkpoint to go on from."""

import json
from pathlib import Path

from transformers import TrainingArguments

from nso_hf.refusal import refusal


def last_complete_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The latest `checkpoint-N` in `folder` that `processes` processes wrote to its end, if any.

    The first process writes trainer_state.json last, and each process its random state: a run that
    was killed while saving leaves a folder without one of them, or with a part of it.
    """
    steps = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and _is_complete(path, processes):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint named by --resume_from_checkpoint, where "last" is the last complete one.

    Never over another run: a folder with checkpoints or results is only gone on with from its own.

    Raises:
        ValueError: there is no such checkpoint, or the output folder holds another run.
    """
    asked, output = args.resume_from_checkpoint, Path(str(args.output_dir))
    last = last_complete_checkpoint(output, args.world_size)
    if str(asked).lower() in ("last", "true"):
        if last is None:
            cure = "Leave it out to start anew"
            rule = (
                f"{output} holds no checkpoint that {args.world_size} process(es) wrote to its end"
            )
            raise refusal("resume_from_checkpoint", asked, rule, cure)
        return str(last)
    if asked is not None and not Path(asked).is_dir():
        raise refusal("resume_from_checkpoint", asked, "no such folder", "Use 'last', or a path")
    is_own = asked is not None and Path(asked).resolve().parent == output.resolve()
    if not is_own and (any(output.glob("checkpoint-*")) or (output / "results.json").exists()):
        rule = "holds the checkpoints or results of another run"
        cure = "Pass --resume_from_checkpoint last, or another --output_dir"
        raise refusal("output_dir", str(output), rule, cure)
    if asked is not None and not _is_complete(Path(asked), args.world_size):
        rule = f"no checkpoint that {args.world_size} process(es) wrote to its end"
        raise refusal("resume_from_checkpoint", asked, rule, "Use 'last', or another path")
    return None if asked is None else str(asked)


def how_to_go_on(args: TrainingArguments, step: int) -> str:
    """What to tell who interrupted a run at this step."""
    last = last_complete_checkpoint(Path(str(args.output_dir)), args.world_size)
    cure = "the same command with --resume_from_checkpoint last goes on"
    cure = cure if last else "no checkpoint was saved yet"
    return f"Interrupted at step {step}; last checkpoint: {last}; {cure}."


def _is_complete(checkpoint: Path, processes: int) -> bool:
    states = [checkpoint / f"rng_state_{rank}.pth" for rank in range(processes)]
    if processes > 1 and not all(state.exists() for state in states):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True

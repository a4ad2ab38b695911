"""Finding the checkpoint to go on from."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments

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


@contextmanager
def resumable(args: TrainingArguments, state: Callable[[], TrainerState]) -> Iterator[None]:
    """Inside, an interrupt or a full disk ends the program in a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"\n{how_to_go_on(args, state().global_step)}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        rule = f"the disk is full; what was being written at step {state().global_step} is lost"
        cure = f"Free some space. {_last_checkpoint(args)}"
        raise refusal("output_dir", str(args.output_dir), rule, cure) from error


def how_to_go_on(args: TrainingArguments, step: int) -> str:
    """What to tell who interrupted a run at this step."""
    return f"Interrupted at step {step}; {_last_checkpoint(args)}."


def _last_checkpoint(args: TrainingArguments) -> str:
    last = last_complete_checkpoint(Path(str(args.output_dir)), args.world_size)
    if last is None:
        has_results = (Path(str(args.output_dir)) / "results.json").exists()
        where = " with another --output_dir" if has_results else ""
        return f"no checkpoint was saved yet; the same command{where} begins anew"
    return f"last checkpoint: {last}; the same command with --resume_from_checkpoint last goes on"


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors' and torch.save's errors have no number.
    texts = ("No space left", "PytorchStreamWriter failed", "inline_container.cc")
    return any(text in str(error) for text in texts)


def _is_complete(checkpoint: Path, processes: int) -> bool:
    states = [checkpoint / f"rng_state_{rank}.pth" for rank in range(processes)]
    if processes > 1 and not all(state.exists() for state in states):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True

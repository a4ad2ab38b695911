"""What is kept of the runs of a comparison: one JSON file each."""

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nso_hf.refusal import refusal
from nso_hf.running.comparison.plan import Record, Run

_ERROR = re.compile(r"error: |[\w.]+(Error|Exception)\b")
_NOT_KEPT = ("log", "options", "best_checkpoint")


def record_of(
    run: Run, results: Mapping[str, Any], seconds: float, error: str = ""
) -> dict[str, Any]:
    """In the shape of peft's method comparison.

    Args:
        results: the recipe's results.json; its logs, its list of all options and the
            path of a checkpoint are left out.
        seconds: from the start of its process to the end.
        error: what a run that failed said last.
    """
    figures = _kept(results)
    versions = figures.pop("versions", {})
    return {
        "run_info": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": run.recipe,
            "setting": run.setting,
            "method": run.method,
            "role": run.role,
            "seed": run.options["seed"],
            "options": run.options,
            "total_time": round(seconds, 2),
            "error_msg": error,
        },
        "train_info": {
            "status": "failed" if error else "success",
            "train_time": figures.get("train_seconds"),
            "num_steps": figures.get("steps"),
            "accelerator_memory_max": figures.get("peak_memory_bytes"),
            "metrics": figures,
        },
        "meta_info": {
            "package_info": versions,
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "cpu_count": os.cpu_count(),
            },
        },
    }


def _kept(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _kept(value) if isinstance(value, Mapping) else value
        for name, value in figures.items()
        if name not in _NOT_KEPT and not name.endswith("_options")
    }


def failure_of(record: Record) -> str:
    """In a line: the error that a run ended with, as far as it said one, and how it ended; empty
    for one that did not fail."""
    *said, cause = record["run_info"]["error_msg"].splitlines() or [""]
    errors = [line for line in said if _ERROR.match(line)]
    return " ".join([*errors[-1:], cause])


def read_records(folder: Path) -> dict[str, Record]:
    """The records in `folder`, by the keys of their runs.

    Raises:
        ValueError: a file there is none.
    """
    found: dict[str, Record] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found[_key(path)] = {name: dict(record[name]) for name in ("run_info", "train_info")}
        except (ValueError, KeyError, TypeError) as error:
            raise refusal("output_dir", str(path), "no record of a run", "Remove it") from error
    return found


def write_record(folder: Path, run: Run, record: Record) -> None:
    write(folder / "runs" / f"{run.name}.json", json.dumps(record, indent=2) + "\n")


def forget_failed(folder: Path) -> None:
    """Remove the records of failed runs, that they are run again."""
    failed = {
        key
        for key, record in read_records(folder).items()
        if record["train_info"]["status"] == "failed"
    }
    for path in (folder / "runs").glob("*.json"):
        if _key(path) in failed:
            path.unlink()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the program is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """Where runs write, which no other process has meanwhile.

    Raises:
        ValueError: one has it, or it cannot be written to.
    """
    folder = output / "work"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        lock = (folder / "lock").open("a+")
    except OSError as error:
        rule = f"cannot be written to ({error.strerror})"
        raise refusal("output_dir", str(output), rule, "Name another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends
        except BlockingIOError as error:
            lock.seek(0)
            rule = f"process {lock.read()} is at work on it"
            raise refusal(
                "output_dir", str(output), rule, "Wait for it, or name another"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def _key(path: Path) -> str:
    return path.stem.rpartition("_")[2]

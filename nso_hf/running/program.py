"""How a program starts and ends, in one process or in several."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from nso_hf.refusal import MissingPackage, Refusal


class CommandParser(argparse.ArgumentParser):
    """Of the command `nso NAME`, whose help is the docstring of its module; a wrong option ends it
    with a line."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(
            prog=f"nso {name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n(--help lists the options)\n")


def folder(text: str) -> Path:
    """A folder that an option of a command names."""
    if not text.strip():
        raise argparse.ArgumentTypeError("names no folder")
    return Path(text)


def run(main: Callable[[], None]) -> None:
    """Run the `main` of a program: a refusal or an interrupt ends in a line, not in a traceback."""
    for stream in (sys.stdout, sys.stderr):  # questions in any script, on a terminal that lacks it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (Refusal, MissingPackage) as error:
        end_with(f"error: {error}")
    except KeyboardInterrupt:
        end_with("\nInterrupted.")
    leave_process_group()


def end_with(line: str, status: int = 1) -> NoReturn:
    """End the program with a line that several processes say once."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # where the first process ends with the same line, the launcher ends this one
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun and accelerate launch say it again, at the end of what they print.
        error = {"message": line.strip(), "timestamp": int(time.time())}
        Path(error_file).write_text(json.dumps(error), encoding="utf-8")
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def leave_process_group() -> None:
    """End the communication between processes, before they end themselves.

    A thread of Gloo drops the tensors of a collective after it has reported the result. It needs
    Python's lock for that, and aborts a process that is finalising (pytorch issue 190489).
    Destroying the group does not wait for that thread where something else still holds the group.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.1)

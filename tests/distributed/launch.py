"""Starting several processes on the CPU."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

_COVERAGE = "COVERAGE_PROCESS_CONFIG"  # where the coverage tool looks, in processes that it starts
_coverage = os.environ.pop(_COVERAGE, None)  # it doubles their time: only where it is asked for


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_processes(command: list[str], timeout: float = 300, measured: bool = False) -> str:
    """The output of a command that starts processes; all of them end with the call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if measured and _coverage is not None:
        environment[_COVERAGE] = _coverage
    started = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, _traceback(output)
    return output


def _traceback(output: str) -> str:
    """Of a process that failed by itself, not because another had; or the end of the output."""
    lines = output.splitlines()
    ranks = ["\n".join(x for x in lines if x.startswith(f"[rank{r}]")) for r in range(8)]
    own = [text for text in ranks if "Traceback" in text and "closed by peer" not in text]
    return (own or [output])[0][-4000:]


def torchrun(
    program: list[str], processes: int = 2, timeout: float = 300, measured: bool = False
) -> str:
    flags = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *program]
    return run_processes(command, timeout, measured)


def launched(
    cases: dict[str, dict[str, Any]], directory: Path, measured: bool = False
) -> "Future[list[dict[str, dict[str, Any]]]]":
    """`launch` for several tests: each that asks for the `result()` gets it, or the error."""
    outcome: Future[list[dict[str, dict[str, Any]]]] = Future()
    try:
        outcome.set_result(launch(cases, directory, measured=measured))
    except Exception as error:
        outcome.set_exception(error)
    return outcome


def launch(
    cases: dict[str, dict[str, Any]],
    directory: Path,
    processes: int = 2,
    measured: bool = False,
) -> list[dict[str, dict[str, Any]]]:
    """Run the worker on the cases; the results of each rank. The cases share a kind of back end.
    `measured` runs count for the coverage."""
    (directory / "cases.json").write_text(json.dumps(cases))
    worker = ["-m", "tests.distributed.worker", str(directory / "cases.json"), str(directory)]
    torchrun(worker, processes, measured=measured)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(processes)]

"""Starting several processes on the CPU."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing import start_processes

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_COVERAGE = "COVERAGE_PROCESS_CONFIG"  # where the coverage tool looks, in processes that it starts
_coverage = os.environ.pop(_COVERAGE, None)  # it doubles their time: only where it is asked for


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_processes(command: list[str], timeout: float = 300) -> None:
    """Run a command that starts processes; all of them end with the call."""
    started = subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT,
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


def _traceback(output: str) -> str:
    """Of a process that failed by itself, not because another had; or the end of the output."""
    lines = output.splitlines()
    ranks = ["\n".join(x for x in lines if x.startswith(f"[rank{r}]")) for r in range(8)]
    own = [text for text in ranks if "Traceback" in text and "closed by peer" not in text]
    return (own or [output])[0][-4000:]


def torchrun(program: list[str], processes: int = 2, timeout: float = 300) -> None:
    flags = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    run_processes([sys.executable, "-m", "torch.distributed.run", *flags, *program], timeout)


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
    timeout: float = 300,
) -> list[dict[str, dict[str, Any]]]:
    """Run the worker on the cases; the results of each rank. The cases share a kind of back end.
    `measured` runs count for the coverage.

    The processes are those that `torchrun` would start, forked from one that has imported the
    worker, since the imports take longer than most cases."""
    (directory / "cases.json").write_text(json.dumps(cases))
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    coverage = {_COVERAGE: _coverage} if measured and _coverage is not None else {}
    multiprocessing.set_forkserver_preload(["tests.distributed.worker"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        context = start_processes(
            _run_worker,
            ({**rendezvous, **sizes, **coverage}, directory),
            processes,
            join=False,
            start_method="forkserver",
        )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"not done within {timeout} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(processes)]


def _run_worker(rank: int, environment: dict[str, str], directory: Path) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    from tests.distributed.worker import run_cases

    if _COVERAGE not in environment:
        run_cases(directory)
        return
    from coverage import process_startup

    coverage = process_startup(force=True)
    assert coverage is not None
    run_cases(directory)
    coverage.stop()
    coverage.save()

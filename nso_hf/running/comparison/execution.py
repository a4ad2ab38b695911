"""Runs of a comparison, each in a process of its own that one with everything imported is copied
to."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nso_hf.refusal import Refusal, refusal
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.comparison.plan import Record, Run
from nso_hf.running.comparison.records import record_of
from nso_hf.running.program import run as run_program

_IMPORTED = ["nso_hf.trainer", "nso_hf.running.results", "peft", "sklearn", "matplotlib.figure"]
_SECONDS_TO_END = 10


def processes() -> Any:
    """Makes processes as copies of one that has imported what takes seconds, and nothing of CUDA,
    which does not survive copying."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() then starts no CUDA
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def load_recipe(script: Path) -> ModuleType:
    """The module of a recipe, imported as Python does when it is run.

    Raises:
        ValueError: it is no recipe.
    """
    sys.path.insert(0, str(script.parent))
    module = import_module(script.stem)
    if not (hasattr(module, "OPTIONS") and callable(getattr(module, "main", None))):
        cure = "Give it OPTIONS, a list of dataclasses, and main(argv)"
        raise refusal("recipe", str(script), "no recipe", cure)
    return module


def arguments(run: Run, recipe: ModuleType, output: Path) -> list[str]:
    """The command line of a run. A recipe that has `--test` reads its test data in the runs that
    are compared alone."""
    options = run.options | {"output_dir": str(output)}
    if run.role == "tuning" and "test" in _option_names(recipe):
        options["test"] = False
    return [word for name, value in options.items() for word in _words(name, value)]


def _option_names(recipe: ModuleType) -> set[str]:
    return {option.name for kind in recipe.OPTIONS for option in fields(kind)}


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, (bool, dict)):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={value}"]


def check_options(recipe: Path, runs: Sequence[Run], folder: Path) -> None:
    """
    Raises:
        ValueError: the recipe refuses the options of one of them.
    """
    with ProcessPoolExecutor(1, mp_context=processes()) as pool:
        message = pool.submit(_first_refusal, recipe, runs, folder).result()
    if message:
        raise Refusal(message)


def _first_refusal(recipe: Path, runs: Sequence[Run], folder: Path) -> str:
    said = io.StringIO()
    try:
        module = load_recipe(recipe)
    except Refusal as error:
        return str(error)
    for run in runs:
        parser = RecipeParser(module.OPTIONS, configs=getattr(module, "CONFIGS", None))
        try:
            with contextlib.redirect_stderr(said):
                parser.parse(arguments(run, module, folder))
        except (Refusal, SystemExit) as error:
            cause = str(error)
            if isinstance(error, SystemExit):  # of argparse
                line = said.getvalue().strip().removeprefix("error: ").partition("\n")[0]
                cause = f"{line}. Correct it in the file."
            where = f"settings={run.setting!r}, " if run.setting else ""
            return f"{where}methods={run.method!r}: refused by {recipe.name}. {cause}"
    return ""


@dataclass
class Running:
    run: Run
    process: Any
    folder: Path
    started: float

    def record(self) -> dict[str, Any]:
        """Of a process that has ended."""
        self.process.join()
        seconds = time.monotonic() - self.started
        code, written = self.process.exitcode, self.folder / "results.json"
        if code == 0 and written.exists():
            results = json.loads(written.read_text(encoding="utf-8"))
            if cause := diverged(results):
                return record_of(self.run, {}, seconds, f"(diverged: {cause})")
            return record_of(self.run, results, seconds)
        cause = f"ended with {code}" if code > 0 else f"killed by signal {-code}"
        if code == 0:
            cause = "wrote no results.json"
        said = _log(self.folder).read_text(encoding="utf-8", errors="replace")[-3000:]
        last = [line for line in said.splitlines() if line.strip()][-10:]
        return record_of(self.run, {}, seconds, "\n".join([*last, f"({cause})"]))

    def stop(self) -> None:
        """End it with all that it has started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            self.process.join(_SECONDS_TO_END)


def diverged(results: Mapping[str, Any]) -> str:
    """Which loss of a run is not a finite number, if any: its accuracy still is one, of the class
    that NaN sorts first."""
    last = results.get("log", [{}])[-1:] or [{}]
    losses = {"training loss": last[0].get("train_loss")}
    for part in ("validation", "test"):
        figures = results.get(part)
        losses[f"{part} loss"] = figures.get("loss") if isinstance(figures, Mapping) else None
    for name, loss in losses.items():
        if isinstance(loss, float) and not math.isfinite(loss):
            return f"{name} {loss}"
    return ""


def run_all(
    recipe: Path,
    next_runs: Callable[[], list[Run]],
    folder: Path,
    *,
    jobs: int,
    launcher: str | None,
    keep: bool,
) -> Generator[tuple[Run, Record], None, None]:
    """Run what there is to run, `jobs` at a time; yields each run as it ends, with its record.

    Args:
        next_runs: those that have not ended, as far as is known; asked again after each.
        folder: a run writes into one of its name in this, which is removed unless it failed.
        keep: do not remove any.
    """
    context, how = processes(), (recipe, jobs, launcher)
    running: dict[str, Running] = {}
    try:
        while True:
            for run in next_runs():
                if len(running) < jobs and run.key not in running:
                    running[run.key] = _start(context, run, folder / run.name, *how)
            if not running:
                return
            connection.wait([one.process.sentinel for one in running.values()])
            for key, one in list(running.items()):
                if not one.process.is_alive():
                    record = one.record()
                    yield running.pop(key).run, record
                    if not keep and record["train_info"]["status"] == "success":
                        shutil.rmtree(one.folder)
                        _log(one.folder).unlink()
    finally:
        for one in running.values():
            one.stop()


def _start(context: Any, run: Run, folder: Path, *how: Any) -> Running:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    _log(folder).touch()
    process = context.Process(target=_work, args=(run, folder, *how))
    started = time.monotonic()
    process.start()
    return Running(run, process, folder, started)


def _work(run: Run, output: Path, script: Path, jobs: int, launcher: str | None) -> None:
    """What the process of a run does."""
    os.setpgrp()  # Ctrl-C is for the comparison, which then stops this and what it has started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _log(output).open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    recipe = load_recipe(script)
    words = arguments(run, recipe, output)
    if launcher is not None:
        sys.exit(subprocess.call([*shlex.split(launcher), str(script), *words]))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // jobs)))
    sys.argv = [str(script), *words]
    run_program(lambda: recipe.main(words))


def _end_with_parent() -> None:
    """However that ends, nothing goes on to write where the next one will."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGTERM)


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")

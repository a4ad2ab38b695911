"""What a run does and finds: `results.json` in its folder."""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from nso_hf.arguments import NSOArguments
from nso_hf.running.recorded_options import RecordedOptions

_PACKAGES = ("nso_hf", "torch", "transformers", "accelerate", "peft")


class Results(dict[str, Any]):
    """What a run found, written anew with each addition, since the next measurement can fail.

    Args:
        args: of training.
        recorded: of this run.
        groups: its other options, by the names that they have here.
    """

    def __init__(self, args: TrainingArguments, recorded: RecordedOptions, **groups: Any) -> None:
        self._args, self._started = args, time.monotonic()
        options = {option.name: getattr(args, option.name) for option in fields(NSOArguments)}
        super().__init__(
            {name: asdict(group) for name, group in groups.items()},
            nso_options=options,
            options=recorded.history,
            versions=versions(),
        )

    def add(self, **figures: Any) -> None:
        self.update(figures, total_seconds=round(time.monotonic() - self._started, 2))
        if self._args.process_index == 0:
            path = Path(str(self._args.output_dir)) / "results.json"
            path.write_text(json.dumps(self, indent=2) + "\n", encoding="utf-8")


def trained(
    trainer: Any, recorded: RecordedOptions, checkpoint: str | None, curvature: Any = None
) -> dict[str, Any]:
    """Train, from a checkpoint on where there is one; return what results.json has on it.

    Seconds are those of training, up to the checkpoint and from there on, without those of
    measuring curvature; memory is that of this process: of the device where it has its own, else of
    the program. A `CurvatureCallback` measures its figures after training too, when averages of the
    weights have been put in the model.

    Raises:
        ValueError: the run that is gone on with had another back end.
    """
    backend = trainer.nso_backend
    recorded.check("backend", backend.name, "back end", backend.name)
    trainer.add_callback(recorded)
    if curvature is not None:
        trainer.add_callback(curvature)
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, log = time.monotonic() - began, trainer.state.log_history
    seconds += recorded.seconds_before
    seconds -= sum(entry.get("curvature/seconds", 0.0) for entry in log)
    memory = _peak_memory(trainer.args.device)
    if curvature is not None:
        trainer.log(curvature.measure())
    return {
        "train_seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "peak_memory_bytes": memory,
        "backend": backend.name,
        "processes": backend.num_processes,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_validation_metric": trainer.state.best_metric,
        "curvature": curvature_of(log[-1]) if curvature is not None else None,
        "sigma": _sigmas(log),
        "log": log,
    }


def _sigmas(log: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The first that was logged, which is the one that "auto" found, and the last."""
    sigmas = [entry["nso/sigma"] for entry in log if "nso/sigma" in entry]
    return {"first": sigmas[0], "last": sigmas[-1]} if sigmas else None


def method_of(results: Mapping[str, Any]) -> str:
    """What a training is called in tables and pictures."""
    options = results["nso_options"]
    if options["method"] == "nso":
        return "NSO" if options["sigma"] else "plain"
    return str(options["method"])


def curvature_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a `CurvatureCallback` in an entry of the log, named without curvature/."""
    prefix = "curvature/"
    return {n.removeprefix(prefix): entry[n] for n in entry if n.startswith(prefix)}


def versions() -> dict[str, str]:
    """Of what a run is computed by."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    has_gpu = torch.cuda.is_available()
    return found | {"device": torch.cuda.get_device_name() if has_gpu else platform.machine()}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

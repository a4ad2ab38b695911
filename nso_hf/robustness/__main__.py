"""Measure what of trained models survives quantisation, noise in the weights, pruning and merging.

    nso robustness runs/plain runs/nso --data test.jsonl --output runs/robustness

Prints tables with a column for each checkpoint, and writes results.json and a picture with all of
them on one scale. results.json is written after each checkpoint. Adapters are merged first.
CLIP models (open_clip, transformers) are measured on images with captions, or with classes:

    nso robustness runs/clip --data val.tar --label_column cls --class_names names.json
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nso_hf.curvature.checkpoint import Sample
from nso_hf.curvature.data_options import (
    add_data_options,
    as_json,
    check_data_options,
    data_of,
)
from nso_hf.curvature.loading import check_checkpoint, load_checkpoint
from nso_hf.refusal import check_positive, needs, refusal
from nso_hf.robustness.clip_models import OPTIONS, check_clip_options, load_clip_model, measurable
from nso_hf.robustness.measuring import Row, check_strengths, robustness
from nso_hf.robustness.merging import average, check_mergeable, task_arithmetic
from nso_hf.robustness.report import described, plot_rows, print_rows
from nso_hf.running.program import CommandParser, folder, run
from nso_hf.tasks.clip.checkpoint import is_clip

_BATCHES = 16  # of a data set, where nobody says how many
_SCALES = (0.3, 0.5, 1.0)


def parser() -> argparse.ArgumentParser:
    made = CommandParser("robustness", __doc__)
    also = "; of CLIP models, what nso clip takes"
    add_data_options(made, split="test", num_batches=_BATCHES, also=also)
    add = made.add_argument
    strengths: dict[str, tuple[Callable[[str], Any], list[Any], str]] = {
        "bits": (int, [8, 4, 3, 2], "of a weight, rounded to nearest"),
        "group_sizes": (size, ["none", 64], "weights that share a scale; none: those of a row"),
        "noise": (float, [0.005, 0.01, 0.02, 0.05], "standard deviations of noise in the weights"),
        "relative_noise": (float, [0.05, 0.1, 0.2, 0.5], "the same over the RMS of a row"),
        "sparsity": (float, [0.5, 0.7, 0.9], "shares of the weights that are set to zero"),
    }
    for name, (kind, default, text) in strengths.items():
        shown = " ".join(map(str, default))
        values: list[Any] = [None if value == "none" else value for value in default]
        text = f"{text} (default: {shown}; nothing after the option: none is measured)"
        add(f"--{name}", type=kind, nargs="*", default=values, metavar="X", help=text)
    add("--num_samples", type=int, default=5, help="draws of noise (default: %(default)s)")
    add("--merge", action="store_true", help="measure the average of the checkpoints too")
    add(
        "--base",
        help="where their training began: measure base + scale * sum(checkpoint - base) too",
    )
    add(
        "--scales",
        type=float,
        nargs="+",
        metavar="X",
        help="of that (default: 0.3 0.5 1.0)",
    )
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--output", type=folder, default=Path("robustness"), help="folder (default: %(default)s)")
    clip = made.add_argument_group("CLIP models")
    for name, text in OPTIONS.items():
        clip.add_argument(f"--{name}", help=text)
    return made


def size(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def check(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that would fail later."""
    check_data_options(options)
    check_strengths(
        options.bits,
        options.group_sizes,
        options.noise,
        options.relative_noise,
        options.sparsity,
        options.num_samples,
    )
    scales = options.scales or []
    for scale in scales:
        check_positive("scales", scale, "Typical: 0.3 to 1")
    if scales and options.base is None:
        raise refusal("scales", scales, "of changes to no base", "Set --base, or leave it out")
    if len(set(scales)) < len(scales):
        raise refusal("scales", scales, "has one twice", "Name each once")
    named = [*options.checkpoints, *filter(None, [options.base])]
    for checkpoint in named:
        if not is_clip(checkpoint):
            check_checkpoint(checkpoint, options.gguf_file)
    check_clip_options(options, named)
    if options.merge and len(options.checkpoints) < 2:
        raise refusal("merge", True, "there is one checkpoint", "Name two or more")


def load(checkpoint: str, options: argparse.Namespace) -> Any:
    """The model of a checkpoint, its adapters merged into it."""
    if is_clip(checkpoint):
        return load_clip_model(checkpoint).model
    model: Any = load_checkpoint(checkpoint, options.gguf_file)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def models(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Name, the checkpoint whose tokenizer it takes, and the model: each checkpoint, then what they
    are merged to."""
    for checkpoint in options.checkpoints:
        yield checkpoint, checkpoint, load(checkpoint, options)
    if not (options.merge or options.base):
        return
    loaded = [load(checkpoint, options) for checkpoint in options.checkpoints]
    first = options.checkpoints[0]
    if options.merge:
        yield "average", first, average(loaded)
    if options.base:
        base = load(options.base, options)
        for scale in options.scales or _SCALES:
            merged = task_arithmetic(base, loaded, scale=scale)
            yield f"base + {scale:g} sum of changes", first, merged


def _on(model: Any, checkpoint: str, options: argparse.Namespace) -> tuple[Any, Sample]:
    """The model with a loss and logits, and what it is measured on."""
    if is_clip(checkpoint):
        model, batches = measurable(model, checkpoint, options, options.num_batches or _BATCHES)
        return model, Sample(batches)
    return model, data_of(options, checkpoint, num_batches=_BATCHES).sample(model)


def measure(name: str, model: Any, sample: Sample, options: argparse.Namespace) -> list[Row]:
    """All measurements of one model."""
    if torch.cuda.is_available():
        model.to("cuda")

    def show(row: Row) -> None:
        print(f"{name}: {described(row)}: loss {row.loss:.4g}", file=sys.stderr, flush=True)

    return robustness(
        model,
        sample.batches,
        bits=options.bits,
        group_sizes=options.group_sizes,
        noise=options.noise,
        relative_noise=options.relative_noise,
        sparsity=options.sparsity,
        num_samples=options.num_samples,
        seed=options.seed,
        on_row=show,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    needs("nso robustness", "recipes", "matplotlib", "rich")
    check(options)
    if options.merge or options.base:
        named = [*filter(None, [options.base]), *options.checkpoints]
        check_mergeable({name: load(name, options) for name in named})
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    measured: dict[str, list[Row]] = {}
    samples: dict[str, Sample] = {}
    for name, checkpoint, model in models(options):
        measurable_model, samples[name] = _on(model, checkpoint, options)
        print(f"{name}: {samples[name]}", file=sys.stderr, flush=True)
        measured[name] = measure(name, measurable_model, samples[name], options)
        results = {
            "options": as_json(options),
            "data": {each: sample.as_json() for each, sample in samples.items()},
            "checkpoints": {
                n: [dataclasses.asdict(r) for r in each] for n, each in measured.items()
            },
        }
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    picture = plot_rows(measured, options.output / "robustness.png")
    print_rows(measured, list(dict.fromkeys(map(str, samples.values()))), [file, picture])


if __name__ == "__main__":
    run(main)

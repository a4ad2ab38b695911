"""The options of the commands that measure checkpoints: which ones, on which data."""

import argparse
from pathlib import Path
from typing import Any

from nso_hf.curvature.checkpoint import Data
from nso_hf.refusal import check_integer, check_seed, refusal
from nso_hf.running.packages import in_package
from nso_hf.running.readiness import check_writable


def add_data_options(
    parser: argparse.ArgumentParser, *, split: str, num_batches: int, also: str = ""
) -> None:
    """
    Args:
        split: what is read of a hub id or folder where the command line does not say it.
        num_batches: how many batches of a data set are.
        also: what else `--data` may be.
    """
    add = parser.add_argument
    what = "folders, hub ids, or package:NAME for that of an installed package; loaded as float32"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=what)
    add(
        "--data",
        required=True,
        help="batches as a .pt file (torch.save of a list of dicts), or a .json, .jsonl, .csv, "
        ".tsv or .parquet file, folder or hub id with the columns text, or prompt and completion "
        f"(language models), text and label, or image and label (classifiers){also}",
    )
    add("--split", default=split, help="of a hub id or folder (default: %(default)s)")
    add("--tokenizer", help="where the tokenizer or image processor is (default: the checkpoint)")
    add("--gguf_file", help="a GGUF file in the checkpoint, or in the base model of its adapters")
    add("--batch_size", type=int, default=8, help="examples a batch (default: %(default)s)")
    batches = f"batches of examples drawn at random (default: {num_batches}; all of a .pt file)"
    add("--num_batches", type=int, help=batches)
    add("--max_length", type=int, default=512, help="tokens a text (default: %(default)s)")


def check_data_options(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: options that would fail later.
    """
    for name in ("batch_size", "max_length", "num_batches"):
        if getattr(options, name) is not None:
            check_integer(name, getattr(options, name), 1, "Give a positive number")
    check_seed("seed", options.seed)
    if len(set(options.checkpoints)) < len(options.checkpoints):
        rule = "names one twice"
        raise refusal("checkpoints", options.checkpoints, rule, "Name each once")
    if options.tokenizer is not None:
        in_package(options.tokenizer, "tokenizer")
    if (options.output / "results.json").exists():
        rule = "holds the results of another run"
        raise refusal("output", str(options.output), rule, "Pass another --output")
    check_writable("output", options.output)


def data_of(options: argparse.Namespace, checkpoint: str, *, num_batches: int) -> Data:
    """What a checkpoint is measured on; `num_batches` as in `add_data_options`."""
    is_saved = Path(options.data).suffix == ".pt"
    return Data(
        path=options.data,
        split=options.split,
        tokenizer=in_package(options.tokenizer or checkpoint, "tokenizer"),
        gguf_file=options.gguf_file,
        batch_size=options.batch_size,
        num_batches=options.num_batches or (None if is_saved else num_batches),
        max_length=options.max_length,
        seed=options.seed,
    )


def as_json(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(it) if isinstance(it, Path) else it for name, it in vars(options).items()}

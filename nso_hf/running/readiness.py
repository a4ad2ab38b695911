"""What can be known before any work is done: whether a training could begin, save and report."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from nso_hf.refusal import check_seed, refusal

_AT_LEAST = {
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
_INTERVALS = ("logging", "eval", "save")


def check_ready(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """Refuse options with which training would fail later.

    Args:
        args: the training options.
        metrics: names of what evaluation measures, without eval_.

    Raises:
        ValueError: the output folder cannot be written to, a package is missing, or an option is
            out of its range or unknown.
    """
    _check_ranges(args)
    best, known = args.metric_for_best_model, list(metrics)
    if best is not None and best.removeprefix("eval_") not in known:
        raise refusal("metric_for_best_model", best, "unknown", f"Use {', '.join(known)}")
    if args.fp16 and args.device.type == "cpu":
        raise refusal("fp16", True, "needs an accelerator", "Use --bf16, or neither")
    _check_packages(args)
    if not args.output_dir:
        raise refusal("output_dir", "", "names no folder", "Leave it out, or name one")
    check_writable("output_dir", Path(str(args.output_dir)))


def _check_ranges(args: TrainingArguments) -> None:
    if args.max_steps == 0 or args.max_steps < -1:
        cure = "Give a positive number, or leave it out to train for --num_train_epochs"
        raise refusal("max_steps", args.max_steps, "leaves nothing to train", cure)
    if args.max_steps < 0 and args.num_train_epochs == 0:
        raise refusal("num_train_epochs", 0, "leaves nothing to train", "Give a positive number")
    for option, low in _AT_LEAST.items():
        value = getattr(args, option)
        if value is not None and not value >= low:
            raise refusal(option, value, f"must be at least {low}", "Correct it, or leave it out")
    for kind in _INTERVALS:
        steps = getattr(args, f"{kind}_steps")
        if getattr(args, f"{kind}_strategy") == "steps" and not steps > 0:
            cure = f"Give a positive number, or --{kind}_strategy no"
            raise refusal(f"{kind}_steps", steps, "must be above 0", cure)
    for option in ("seed", "data_seed"):
        if getattr(args, option) is not None:
            check_seed(option, getattr(args, option))


def _check_packages(args: TrainingArguments) -> None:
    for tracker in args.report_to or []:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise refusal("report_to", tracker, _line(error), "Or use --report_to none") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "pass a" not in str(error):  # those that need the model are tried with it
            optim = getattr(args.optim, "value", args.optim)
            cure = "Or use another --optim, such as adamw_torch"
            raise refusal("optim", optim, _line(error), cure) from error


def check_writable(option: str, folder: Path) -> None:
    """
    Raises:
        ValueError: the folder is a file, or cannot be made or written to; nothing is left there.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise refusal(option, str(folder), f"{nearest} is a file", "Name another folder")
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        rule = f"{nearest} cannot be written to"
        raise refusal(option, str(folder), rule, "Name another folder") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")

"""The options of NSO: a dataclass that any TrainingArguments takes as a mixin."""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from nso_hf.methods import METHODS, Method
from nso_hf.methods.options import SharedOptions
from nso_hf.refusal import check_choice, check_integer, refusal
from nso_hf.step.selection import SelectionOptions

BACKUPS = ("device", "cpu")


@dataclass
class NSOArguments(SharedOptions, SelectionOptions):
    """The options of Noise Stability Optimization (arXiv 2306.08553), apart from those of training.

    Combine them with any training arguments: `class MyConfig(NSOArguments, SFTConfig)`.

    Raises:
        ValueError: an option is out of its range or does not go with another; the message names the
            option, its value, the rule and the cure.
    """

    method: str = field(
        default="nso",
        metadata={
            "help": f"The update rule, one of {', '.join(METHODS)}.",
            "choices": list(METHODS),
        },
    )
    method_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of methods other than nso, a dict or JSON."},
    )
    backup: str = field(
        default="device",
        metadata={
            "help": "Where the displaced weights are backed up; cpu saves a copy of them on a GPU.",
            "choices": list(BACKUPS),
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Makes `class MyConfig(NSOArguments, SFTConfig): pass` whole, with an __init__ that takes
        # both. A class that declares options of its own is decorated by its author, as ever: twice
        # would lose the options' metadata.
        if not inspect.get_annotations(cls):
            dataclass(cls)

    def __post_init__(self) -> None:
        if isinstance(self.method_kwargs, str):
            try:
                self.method_kwargs = json.loads(self.method_kwargs)
            except json.JSONDecodeError as error:
                rule, cure = f"not JSON ({error})", 'Write it as {"name": 0.1}'
                raise refusal("method_kwargs", self.method_kwargs, rule, cure) from error
        self.check()
        following = getattr(super(), "__post_init__", None)  # that of the training arguments
        if following is not None:
            following()
        if hasattr(self, "device") and self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns

    def check(self) -> None:
        """Raise a `ValueError` for an option out of range, or one that does not go with another."""
        check_choice("method", self.method, list(METHODS))
        check_choice("backup", self.backup, list(BACKUPS))
        self.check_shared()
        self.check_selection()
        for option in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if hasattr(self, option):  # with training arguments, which leave it to the data loader
                check_integer(option, getattr(self, option), 1, "Typical values are 8 to 128")
        self.chosen_method().check()

    def chosen_method(self) -> Method:
        """The method, with its options.

        Raises:
            ValueError: one of them is unknown, or out of its range.
        """
        method = METHODS[self.method]
        given = self.method_kwargs if self.method_kwargs is not None else {}
        if not isinstance(given, dict):
            cure = 'Write it as {"name": 0.1}'
            raise refusal("method_kwargs", given, "must be a dict of options", cure)
        takes = [option.name for option in dataclasses.fields(method.Options)]
        for name in given:
            if name not in takes:
                known = f"takes {', '.join(takes)}" if takes else "takes none"
                rule = f"method {self.method!r} {known}, not {name!r}"
                raise refusal("method_kwargs", given, rule, f"Remove {name!r}")
        options = method.Options(**given)
        read = method.reads | _OF_EVERY_METHOD
        unread = {
            option.name: (getattr(self, option.name), option.default)
            for option in dataclasses.fields(SharedOptions)
            if option.name not in read and getattr(self, option.name) != option.default
        }
        if unread:
            *others, (name, (value, _)) = unread.items()
            also = "".join(f", nor {other}={it!r}" for other, (it, _) in others)
            rule = f"method {self.method!r} does not read it{also}"
            defaults = ", ".join(f"{other}={default!r}" for other, (_, default) in unread.items())
            raise refusal(name, value, rule, f"Set {defaults}, the defaults, or method='nso'")
        return method(self, options)


@dataclass
class NSOConfig(NSOArguments, TrainingArguments):
    """`TrainingArguments` with the options of NSO."""


@dataclass
class NSOSeq2SeqConfig(NSOArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the options of NSO."""


_OF_EVERY_METHOD = {"common_random_numbers", "start", "interval"}


def check_training(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: an option of the Trainer would have weights written or copied in a pass.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        rule = "it updates the weights during the backward pass, while they are perturbed"
        cure = "Use an optimizer that steps after it, as adamw_torch or adafactor"
        raise refusal("optim", optim, rule, cure)
    if args.n_gpu > 1:
        rule = "DataParallel copies the weights to every GPU in each forward pass"
        cure = "Launch one process per GPU with torchrun, or make one GPU visible"
        raise refusal("n_gpu", args.n_gpu, rule, cure)

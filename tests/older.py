"""Options that transformers has had for a shorter time than nso_hf supports it, for the tests."""

import dataclasses
import functools

from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from nso_hf import NSOConfig, NSOSeq2SeqConfig

NEW = {
    "train_sampling_strategy": None,
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Option -> what it was called before; None: there was none."""

IS_VERSION_4 = not hasattr(Trainer, "_run_epoch")
"""Its Trainer logs losses with four decimals, and resumes with other data from the second epoch on
(plain training, too)."""

_ORIGINAL_SAMPLER = Trainer._get_train_sampler


def _takes_new_options(cls):
    original = cls.__init__

    @functools.wraps(original)
    def initialise(self, *args, **options):
        for name, earlier in NEW.items():
            if name in options and name not in {f.name for f in dataclasses.fields(cls)}:
                value = options.pop(name)
                options |= {earlier: value} if earlier else {}
                self._sampling = value if earlier is None else getattr(self, "_sampling", None)
        original(self, *args, **options)

    cls.__init__ = initialise


def _sampler(self, *args):
    if getattr(self.args, "_sampling", None) == "sequential":
        return SequentialSampler(self.train_dataset)
    return _ORIGINAL_SAMPLER(self, *args)


if "train_sampling_strategy" not in {f.name for f in dataclasses.fields(TrainingArguments)}:
    Trainer._get_train_sampler = _sampler
    for arguments in (TrainingArguments, Seq2SeqTrainingArguments, NSOConfig, NSOSeq2SeqConfig):
        _takes_new_options(arguments)

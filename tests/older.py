"""Options that transformers has had for a shorter time than nso_hf supports it, for the tests."""

import dataclasses
import functools
import inspect
import os

import torch
from accelerate import Accelerator
from packaging.version import Version
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from nso_hf import NSOConfig, NSOSeq2SeqConfig
from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.images.arguments import MAEConfig

NEW = {
    "train_sampling_strategy": None,
    "ddp_static_graph": None,
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Option -> what it was called before; None: there was none."""

LOGGED = 1e-5 if hasattr(Trainer, "_run_epoch") else 6e-5
"""Tolerance of logged losses, which had four decimals."""
IS_VERSION_4 = not hasattr(Trainer, "_run_epoch")
"""Its Trainer resumes with other data from the second epoch on (plain training, too)."""

HOLDS_GRADIENTS = "requires_gradient_sync" in inspect.getsource(Accelerator.no_sync)
"""Whether accumulation under FSDP2 puts the reduction of gradients off, in plain training."""

_LEFT_BEHIND = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_")
"""Variables that earlier arguments set for good."""
_SET: dict[str, str] = {}
_ORIGINAL_SAMPLER = Trainer._get_train_sampler
_ORIGINAL_OPTIMIZER = Trainer.create_optimizer


def _takes_new_options(cls):
    original = cls.__init__

    @functools.wraps(original)
    def initialise(self, *args, **options):
        for name in [name for name in os.environ if name.startswith(_LEFT_BEHIND)]:
            del os.environ[name]
        _launched_with(options.pop("fsdp", None), options.pop("fsdp_config", None) or {})
        for name, earlier in NEW.items():
            if name in options and name not in {f.name for f in dataclasses.fields(cls)}:
                value = options.pop(name)
                options |= {earlier: value} if earlier else {}
                if name == "train_sampling_strategy":
                    self._sampling = value
        original(self, *args, **options)

    cls.__init__ = initialise


def _launched_with(fsdp, settings):
    """FSDP2 was only to be had by environment variables, as `accelerate launch` sets them."""
    for name in [name for name in os.environ if name in _SET]:
        del os.environ[name]
    _SET.clear()
    if fsdp:
        _SET.update(
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION=str(settings["version"]),
            FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_RESHARD_AFTER_FORWARD=str(settings["reshard_after_forward"]).lower(),
            FSDP_OFFLOAD_PARAMS=str(settings.get("cpu_offload", False)).lower(),
            FSDP_ACTIVATION_CHECKPOINTING=str(settings.get("activation_checkpointing", False)),
        )
        layers = settings["transformer_layer_cls_to_wrap"]
        if layers is not None:  # else those that the model names
            _SET["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(layers)
        os.environ |= _SET


def _sampler(self, *args):
    if getattr(self.args, "_sampling", None) == "sequential":
        return SequentialSampler(self.train_dataset)
    return _ORIGINAL_SAMPLER(self, *args)


def _create_optimizer(self, *args, **kwargs):
    """DeepSpeed drops a group without parameters, as of biases under LoRA, which the schedule then
    misses: with these versions a user of plain training meets this too."""
    optimizer = _ORIGINAL_OPTIMIZER(self, *args, **kwargs)
    if hasattr(optimizer, "param_groups"):  # no stand-in for one of DeepSpeed's configuration
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def averages_on_cpu():
    """In PyTorch before 2.11, Gloo sums where it is asked for the average, so that gradients of
    FSDP2 on CPUs come out too large by the number of processes: let FSDP2 divide."""
    if Version(torch.__version__) >= Version("2.11"):
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    factors = _fsdp_collectives._get_gradient_divide_factors
    _fsdp_collectives._get_gradient_divide_factors = lambda *args: factors(*args[:5], True)


if "train_sampling_strategy" not in {f.name for f in dataclasses.fields(TrainingArguments)}:
    Trainer._get_train_sampler = _sampler
    Trainer.create_optimizer = _create_optimizer
    for arguments in (
        TrainingArguments,
        Seq2SeqTrainingArguments,
        NSOConfig,
        NSOSeq2SeqConfig,
        CLIPConfig,
        MAEConfig,
    ):
        _takes_new_options(arguments)

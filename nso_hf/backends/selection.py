"""The only reader of the kind of distributed run."""

import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from nso_hf.backends.base import Backend
from nso_hf.backends.deepspeed import DeepSpeed
from nso_hf.backends.fsdp2 import FSDP2, is_sharded
from nso_hf.backends.replicated import Replicated, ThisProcess
from nso_hf.backends.versions import check_deepspeed_version
from nso_hf.refusal import refusal

OPTIONS = ("fsdp", "fsdp_config", "deepspeed")
"""The training options that choose a back end."""

_SPLIT = "tensor, context, sequence, pipeline and expert parallelism split one batch over processes"
_CURE = "Launch with a configuration of the folder accelerate_configs"


def select(accelerator: Accelerator, model: nn.Module) -> Backend:
    """The back end of this run for `model`, wrapped or not; a `ValueError` where NSO would compute
    something else than it says."""
    check(accelerator)
    _check_model(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeed(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP or is_sharded(model):
        return FSDP2(accelerator, model)
    return Replicated(accelerator, model)


def alone(model: nn.Module) -> Backend:
    """The back end of a model that this process holds whole and works on by itself."""
    if is_sharded(model) or any(hasattr(p, "ds_tensor") for p in model.parameters()):
        rule = "its weights are sharded over processes"
        raise refusal("model", type(model).__name__, rule, "Pass the Trainer that holds it")
    _check_model(model)
    stand_in: Any = ThisProcess(model)
    return Replicated(stand_in, model)


def check(accelerator: Accelerator) -> None:
    """Raise a `ValueError` for a kind of run on which NSO would compute something else."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > accelerator.num_processes:
        rule = f"{launched} processes were launched, and each would train on the same batches"
        cure = "On a machine without accelerators, pass use_cpu=True"
        raise refusal("num_processes", accelerator.num_processes, rule, cure)
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)
        check_deepspeed_version(accelerator.state.deepspeed_plugin.zero_stage)
    elif kind == DistributedType.FSDP:
        version = accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            rule = "in FSDP1 weights go stale between the passes of a step"
            raise refusal("fsdp_version", version, rule, "Set fsdp_version to 2")
    elif kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        rule = "NSO runs in one process, under DistributedDataParallel, FSDP2 and DeepSpeed"
        raise refusal("distributed_type", kind.value, rule, _CURE)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # Set by `accelerate launch`, and by Accelerate where the Trainer's options ask for it.
        is_asked_for = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if is_asked_for and kind.value != name:
            rule = f"{name} was asked for, but on this device Accelerate makes the run {kind.value}"
            cure = f"Run it on accelerators, or without {name}"
            raise refusal(f"ACCELERATE_USE_{name}", "true", rule, cure)
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise refusal(f"parallelism_config.{name}", getattr(parallelism, name), _SPLIT, _CURE)


def _check_model(model: nn.Module) -> None:
    loaded: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    for name in ("tp_size", "pp_size", "ep_size"):
        if (getattr(loaded, name, None) or 1) > 1:
            cure = "Load the model with fsdp_size and dp_replicate_size alone"
            raise refusal(f"distributed_config.{name}", getattr(loaded, name), _SPLIT, cure)


def _check_deepspeed(plugin: Any) -> None:
    for key, is_harmless, rule in _DEEPSPEED_RULES:
        value = plugin.hf_ds_config.get_value(key)
        if value is not None and not is_harmless(value):
            raise refusal(key, value, rule, "Remove it from the DeepSpeed configuration")


def _is_off(value: Any) -> bool:
    return not value


def _is_one(value: Any) -> bool:
    return value in (0, 1)


_DEEPSPEED_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "zero_optimization.zero_hpz_partition_size",
        _is_one,
        "it keeps further partitions of the weights, which go stale between the passes of a step",
    ),
    (
        "zero_optimization.zero_quantized_weights",
        _is_off,
        "the noise would be quantised with the weights on their way to the forward pass",
    ),
    (
        "zero_optimization.offload_param.device",
        lambda value: value != "nvme",
        "weights on NVMe are read and written at moments of DeepSpeed's own",
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        _is_off,
        "the optimizer works during the backward pass, while the weights are perturbed",
    ),
    ("zero_optimization.zenflow", _is_off, "the optimizer steps by parts, on its own schedule"),
    ("compile.deepcompile", _is_off, "the compiled graph gathers weights at moments of its own"),
    ("tensor_parallel.autotp_size", _is_one, _SPLIT),
    ("sequence_parallel_size", _is_one, _SPLIT),
]
"""Key of DeepSpeed's configuration, whether a value of it is harmless, and the rule if it is
not."""

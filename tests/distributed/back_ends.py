"""The back ends that the tests run on, on CPUs: options for the trainer, and what tells that it got
them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from tests.older import averages_on_cpu

LAYER = "LlamaDecoderLayer"


def fsdp2(**settings: Any) -> dict[str, Any]:
    layers = {"transformer_layer_cls_to_wrap": [LAYER], "reshard_after_forward": True}
    return {"fsdp": True, "fsdp_config": {"version": 2, **layers, **settings}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed as the Trainer configures it, with torch's own optimizers."""
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
                **settings,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


BACK_ENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": fsdp2(),
    "fsdp2 not resharded": fsdp2(reshard_after_forward=False),
    "fsdp2 offload": fsdp2(cpu_offload=True),
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero2 offload": zero(2, offload_optimizer={"device": "cpu"}),
    "zero3": zero(3, stage3_param_persistence_threshold=0),
    "zero3 persistent": zero(3, stage3_param_persistence_threshold=10**5),
    "zero3 offload": zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
}


def allow_fsdp_on_cpu() -> None:
    """Accelerate turns FSDP on CPUs into DDP without a word, by the kind of its process group."""
    initialise = AcceleratorState.__init__

    def initialise_on_cpu(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        is_new = AcceleratorState._shared_state == {}
        if is_new and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = initialise_on_cpu
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pinned memory needs a driver
    averages_on_cpu()


def lora(model: nn.Module) -> nn.Module:
    """Adapters on attention alone, so that frozen and trainable weights are mixed."""
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, adapters)


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The whole of a parameter that may be sharded, in every process."""
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()
    elif isinstance(parameter, DTensor):
        yield parameter.full_tensor().detach()
    else:
        yield parameter.detach()


def masters(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """The float32 weights that the optimizer steps on, whole; of frozen ones the only weights."""
    groups = getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])
    copies = {
        id(low): high
        for lows, highs in zip(*groups, strict=False)
        for low, high in zip(lows, highs, strict=True)
    }  # of DeepSpeed's stage 0 in half precision
    return [_master(parameter, copies) for parameter in model.parameters()]


def _master(parameter: nn.Parameter, copies: dict[int, Tensor]) -> Tensor:
    if id(parameter) in copies:
        return copies[id(parameter)].detach().clone()
    if parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or is_partitioned(parameter)):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).clone()
    with gathered(parameter) as whole:
        return whole.clone() if whole.dtype == torch.float64 else whole.float().clone()


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds it."""
    return hasattr(parameter, "ds_tensor")


def assert_is(back_end: str, facts: dict[str, Any], processes: int) -> None:
    """That a run got the back end it asked for, by what its model and its engine are."""
    kind = back_end.split()[0]
    every, none = facts["parameters"], 0
    assert facts["world_size"] == facts["processes"] == processes
    if kind == "ddp":
        assert facts["distributed_type"] == "MULTI_CPU"
        assert facts["wrapped"] == "DistributedDataParallel"
        assert facts["backend"] == "Replicated"
        assert (facts["dtensors"], facts["partitioned"]) == (none, none)
    elif kind == "fsdp2":
        assert facts["distributed_type"] == "FSDP"
        assert facts["backend"] == "FSDP2"
        assert (facts["dtensors"], facts["partitioned"]) == (every, none)
        assert facts["fsdp_modules"] >= 3  # two layers and the root
    else:
        stage = int(kind.removeprefix("zero"))
        assert facts["distributed_type"] == "DEEPSPEED"
        assert facts["wrapped"] == "DeepSpeedEngine"
        assert facts["backend"] == "DeepSpeed"
        assert facts["stage"] == facts["engine_stage"] == stage
        assert (facts["dtensors"], facts["partitioned"]) == (none, every if stage == 3 else none)
    assert facts["offloads"] == ("offload" in back_end)

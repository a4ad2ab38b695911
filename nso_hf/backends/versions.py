"""What PyTorch and DeepSpeed did otherwise in versions that people still have."""

from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch.distributed.fsdp import FSDPModule

from nso_hf.refusal import refusal

_ADDS_GRADIENTS = "0.19.0"  # DeepSpeed, in stages 0 and 2, offloaded or not


def parameter_groups(state: Any) -> list[Any]:
    """Those that a module of FSDP2 gathers together; there was one, or none, up to torch 2.10."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def forget_iteration(root: FSDPModule) -> None:
    """After an exception in a pass: what `reset_iter_state` does, where there is one."""
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state: Any = root._get_fsdp_state()
    for each in state._state_ctx.all_states:
        each._training_state = TrainingState.IDLE
        each._modules_to_run_forward.clear()
        for group in parameter_groups(each):
            group._training_state = TrainingState.IDLE
            group._all_gather_result = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._to_sharded()
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def check_deepspeed_version(stage: int) -> None:
    """Refuse versions whose ZeRO overwrites the gradients of earlier backward passes."""
    installed = version("deepspeed")
    if stage in (0, 2) and Version(installed) < Version(_ADDS_GRADIENTS):
        rule = f"its stage {stage} loses gradients where a step has several backward passes"
        cure = f"Install deepspeed>={_ADDS_GRADIENTS}, or use stage 1 or 3"
        raise refusal("deepspeed", installed, rule, cure)

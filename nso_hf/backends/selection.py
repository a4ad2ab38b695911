"""The only reader of the kind of distributed run."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from nso_hf.backends.base import Backend
from nso_hf.backends.replicated import Replicated
from nso_hf.refusal import refusal


def select(accelerator: Accelerator) -> Backend:
    """The back end of this run; a `ValueError` where NSO would compute something else than it
    says."""
    cure = "Launch with accelerate_configs/single.yaml or accelerate_configs/ddp.yaml"
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        rule = "NSO runs in one process and under DistributedDataParallel"
        raise refusal("distributed_type", kind.value, rule, cure)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        rule = f"FSDP was asked for, but on this device the run silently became {kind.value}"
        raise refusal("fsdp", True, rule, cure)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        rule = "tensor, context and sequence parallelism split one batch over processes"
        raise refusal("parallelism_config", str(parallelism), rule, cure)
    return Replicated(accelerator)

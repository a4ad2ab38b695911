"""Weights sharded along their first dimension by `torch.distributed.fsdp.fully_shard` (FSDP2), with
or without further replicas (HSDP), by Accelerate or when the model was loaded.

The optimizer's weights are the shards, in float32 where training is in mixed precision: they are
what is perturbed, before the cast. A forward pass gathers them; the root's stay gathered after a
forward pass without a backward pass, and would be used again.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nso_hf.backends.base import Backend, Weight
from nso_hf.backends.errors import not_prepared
from nso_hf.backends.versions import forget_iteration, parameter_groups
from nso_hf.refusal import refusal


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or part of it, was sharded by `fully_shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


class FSDP2(Backend):
    """Every process holds a shard of each weight; some weights may be whole (adapters that were
    added to a model sharded at load time)."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(accelerator, model)
        self.num_copies = _replicas(accelerator, model)
        self.copy = accelerator.process_index * self.num_copies // self.num_processes
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        offloads = isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)
        self.name = "FSDP2, offloaded to the CPU" if offloads else "FSDP2"

    def weights(self, beside: Iterable[tuple[str, nn.Parameter]] = ()) -> list[Weight]:
        self.discard_gathered()  # while gathered, the parameters are other tensors
        return super().weights(beside)

    def _held(self, name: str, index: int, parameter: nn.Parameter) -> Weight:
        if not isinstance(parameter, DTensor):
            return super()._held(name, index, parameter)
        mesh, placements = parameter.device_mesh, parameter.placements
        *outer, inner = placements
        if inner != Shard(0) or any(placement != Replicate() for placement in outer):
            rule = f"its placement {placements} is not that of FSDP2 alone"
            cure = "Use data parallelism without tensor parallelism"
            raise refusal("parameter", name, rule, cure)
        _, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        start = offsets[0] * parameter.shape[1:].numel()
        copies = mesh.size() // mesh.size(mesh.ndim - 1)
        local = parameter.to_local().detach()
        return Weight(name, index, parameter, local, start, parameter.shape, copies)

    def discard_gathered(self) -> None:
        for module in self._sharded_modules():
            module.reshard()

    def abandon(self) -> None:
        for module in self._sharded_modules():
            state = module._get_fsdp_state()
            if state._is_root:
                forget_iteration(module)
            # Unsharded gradients that accumulation holds survive the reset, and `zero_grad`.
            for parameter in (p for group in parameter_groups(state) for p in group.fsdp_params):
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None

    def check_prepared(self) -> None:
        if not is_sharded(self._model):
            raise not_prepared(self._model, "sharded")

    @property
    def differentiates_twice(self) -> bool:
        return False

    @contextmanager
    def at_full_precision(self) -> Iterator[None]:
        states = [module._get_fsdp_state() for module in self._sharded_modules()]
        states = [state for state in states if state._mp_policy != MixedPrecisionPolicy()]
        policies = [state._mp_policy for state in states]
        self.discard_gathered()
        for state in states:
            _set_precision(state, MixedPrecisionPolicy())
        try:
            with super().at_full_precision():
                yield
        finally:
            self.discard_gathered()
            for state, policy in zip(states, policies, strict=True):
                _set_precision(state, policy)

    def gradient(self, loss: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        kept = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            (loss * self.num_processes).backward()
            return [self._gradient_of(weight) for weight in weights]
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient

    def _gradient_of(self, weight: Weight) -> Tensor:
        gradient = weight.parameter.grad
        if gradient is None:
            return torch.zeros_like(weight.data)
        if isinstance(gradient, DTensor):
            return gradient.to_local()
        return self.summed([gradient / self.num_processes])[0]

    def whole(self, weight: Weight) -> Tensor:
        parameter = weight.parameter.detach()
        if isinstance(parameter, DTensor):
            return parameter.full_tensor().to(weight.data.device)
        return super().whole(weight)

    def _own_part(self, tensor: Tensor | None) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else super()._own_part(tensor)

    @contextmanager
    def _reduced_apart(self) -> Iterator[None]:
        """The pass reduces its gradient, over replicas too. What accumulation holds unsharded, and
        what replicas have not reduced yet, waits."""
        groups = [
            group
            for module in self._sharded_modules()
            for group in parameter_groups(module._get_fsdp_state())
        ]
        parameters = [p for group in groups for p in group.fsdp_params]
        whole = [p._unsharded_param for p in parameters if hasattr(p, "_unsharded_param")]
        with (
            _set(groups, "reduce_grads", True),
            _set(groups, "all_reduce_grads", True),
            _set(groups, "_partial_reduce_output", None),
            _set(parameters, "unsharded_accumulated_grad", None),
            _set(whole, "grad", None),
        ):
            yield

    @contextmanager
    def _without_reduction(self, is_first: bool) -> Iterator[None]:
        """To put off the reduction of sharded gradients is to hold all of them, unsharded. So they
        are reduced in each pass, but where accumulation holds them anyway; between replicas of the
        shards it costs nothing to reduce once."""
        if not self._accelerator.sync_gradients:  # the Trainer's own accumulation decides
            yield
            return
        plugin = self._accelerator.gradient_state.plugin_kwargs
        hold = not (is_first or plugin.get("sync_each_batch", False) or self.num_copies > 1)
        modules = self._sharded_modules()
        for module in modules:
            if hold:
                module.set_requires_gradient_sync(False, recurse=False)
            else:
                module.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self._model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def _set(objects: Sequence[Any], attribute: str, value: Any) -> Iterator[None]:
    """An attribute of several objects has another value inside."""
    kept = [getattr(each, attribute) for each in objects]
    for each in objects:
        setattr(each, attribute, value)
    try:
        yield
    finally:
        for each, before in zip(objects, kept, strict=True):
            setattr(each, attribute, before)


def _replicas(accelerator: Accelerator, model: nn.Module) -> int:
    """Groups of processes that each hold a copy: more than one in HSDP."""
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    if meshes:
        return meshes[0].size() // meshes[0].size(meshes[0].ndim - 1)
    parallelism = getattr(accelerator, "parallelism_config", None)
    return parallelism.dp_replicate_size if parallelism is not None else 1


def _set_precision(state: Any, policy: MixedPrecisionPolicy) -> None:
    state._mp_policy = policy
    for group in parameter_groups(state):
        group.mp_policy = policy
        group._init_mp_dtypes()
        for parameter in group.fsdp_params:  # what it is gathered into is made anew
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)

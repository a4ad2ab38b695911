"""Singular vectors of the gradient that frozen weights have on one batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nso_hf.refusal import refusal

OVERSAMPLING, ITERATIONS = 8, 8
"""Of the randomised SVD (Halko, Martinsson, Tropp 2009): what is outside of the first r directions
falls as (s_(r+9) / s_r)^17."""


def singular_vectors(
    model: Any, layers: Mapping[str, Any], adapter: str, batch: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of G = sum of dy x' over the tokens of `batch`, for each layer y = W x without its adapter,
    the first r singular vectors: U (outputs, r) and V' (r, inputs), float32.

    No weight needs a gradient, so it may be quantised; and one G is there at a time.

    Raises:
        ValueError: a layer has no gradient on this batch, or the weights are not in this process.
    """
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        rule = "its weights are not whole in this process, and G is the gradient of the whole"
        cure = "Use the plain form, or a model that is sharded later"
        raise refusal("model", type(model).__name__, rule, cure)
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    was_training = model.training
    hooks = [
        layer.get_base_layer().register_forward_hook(_recorder(passed[name]))
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        device = next(model.parameters()).device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with model.disable_adapter(), torch.enable_grad():
            loss = model(**given).loss
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    outputs = [y for calls in passed.values() for _, y in calls]
    gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    vectors = {}
    for name, calls in passed.items():
        G = None
        for x, _ in calls:
            if (dy := next(gradients)) is not None:
                part = dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                G = part if G is None else G + part
        if G is None:
            cure = "Give a larger one, or leave the layer out of target_modules"
            raise refusal("first_batch", list(batch), f"no gradient reaches {name}", cure)
        vectors[name] = _first_vectors(G, layers[name].r[adapter])
    return vectors


def _recorder(calls: list[tuple[Tensor, Tensor]]) -> Any:
    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it is trained
            output.requires_grad_()
        calls.append((inputs[0].detach(), output))
        return output.clone()  # which what follows may overwrite

    return record


def _first_vectors(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    devices = [G.device] if G.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=G.device.type if devices else "cuda"):
        torch.manual_seed(0)  # every process finds the same
        size = min(rank + OVERSAMPLING, *G.shape)
        U, _, V = torch.svd_lowrank(G, size, ITERATIONS)
    return U[:, :rank], V[:, :rank].T

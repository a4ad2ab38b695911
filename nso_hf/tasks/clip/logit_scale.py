"""The scale of the logits, kept in bounds by the optimizer: in its own copy, if it has one."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

MAX_LOGIT_SCALE = math.log(100)  # of the paper of CLIP, arXiv 2103.00020


def keep_logit_scale_in_bounds(optimizer: Optimizer, model: nn.Module) -> None:
    """After each step of `optimizer`, put the model's `logit_scale` back into [0, ln 100].

    It gets a group of its own, since some back ends flatten the groups into single tensors.
    """
    parameter = dict(model.named_parameters()).get("logit_scale")
    for group in list(optimizer.param_groups):
        others = [p for p in group["params"] if p is not parameter]
        if len(others) < len(group["params"]) and not group.get("logit_scale"):
            group["params"] = others
            own = {**group, "params": [parameter], "logit_scale": True}
            optimizer.add_param_group(own)
            optimizer.register_step_post_hook(_clamp)


def groups_of_logit_scale(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that are kept in bounds: one, or none."""
    return [group for group in optimizer.param_groups if group.get("logit_scale")]


@torch.no_grad()
def _clamp(optimizer: Optimizer, *args: Any) -> None:
    for group in groups_of_logit_scale(optimizer):
        for parameter in group["params"]:
            parameter.clamp_(0, MAX_LOGIT_SCALE)

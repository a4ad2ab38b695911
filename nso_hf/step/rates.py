"""Weights that are trained at a share of the learning rate."""

from typing import Any

from torch.optim import Optimizer

from nso_hf.refusal import refusal


def shares(model: Any) -> dict[int, float]:
    """Of the parameters of modules that have a `learning_rate_share`: id -> that share. A module
    says it and not the parameter, since sharding puts others in its place."""
    return {
        id(parameter): module.learning_rate_share
        for module in model.modules()
        if hasattr(module, "learning_rate_share")
        for parameter in module.parameters(recurse=False)
    }


def slow_down(optimizer: Any, model: Any) -> None:
    """Give those parameters of an optimizer groups of their own, at their share of the group's
    learning rate. Before a scheduler is made of it, which keeps the ratio.

    Raises:
        ValueError: the optimizer sets its learning rate itself.
    """
    share_of = shares(model)
    for group in list(optimizer.param_groups):
        slow = [p for p in group["params"] if id(p) in share_of]
        if not slow:
            continue
        if group.get("lr") is None:
            rule = "it sets its own learning rate, and some weights are to have a share of it"
            cure = "Give it a fixed one, or use adamw_torch"
            raise refusal("optim", type(optimizer).__name__, rule, cure)
        group["params"] = [p for p in group["params"] if id(p) not in share_of]
        for share in sorted({share_of[id(p)] for p in slow}):
            own = [p for p in slow if share_of[id(p)] == share]
            optimizer.add_param_group({**group, "params": own, "lr": share * group["lr"]})


def check_can_be_slow(optimizer: Any, model: Any) -> None:
    """
    Raises:
        ValueError: there are such parameters, and the optimizer stands for one that the back end
            makes, with one learning rate.
    """
    if not isinstance(optimizer, Optimizer) and shares(model):
        rule = "the back end makes it with one learning rate, and some weights are to have less"
        cure = "Leave it out of that configuration: the Trainer makes the one that optim names"
        raise refusal("optimizer", type(optimizer).__name__, rule, cure)

"""Which weights are perturbed, and whether they can be."""

import re
from collections.abc import Sequence

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nso_hf.arguments import NSOArguments
from nso_hf.backends import Weight
from nso_hf.refusal import refusal


def select_perturbed(weights: Sequence[Weight], args: NSOArguments) -> list[Weight]:
    """The trainable ones among all `weights` of a model that the options of `args` select.

    Raises:
        ValueError: a pattern matches no weight, no weight is selected, or one cannot carry noise.
    """
    for option in ("perturb_include", "perturb_exclude"):
        for pattern in getattr(args, option) or []:
            if not any(re.search(pattern, weight.name) for weight in weights):
                names = ", ".join(weight.name for weight in weights[:3])
                cure = f"Use part of a parameter's name, such as {names}"
                raise refusal(option, pattern, "matches no parameter", cure)
    selected = [
        weight
        for weight in weights
        if weight.parameter.requires_grad
        and len(weight.shape) >= args.perturb_min_ndim
        and (args.perturb_include is None or _matches(weight, args.perturb_include))
        and not _matches(weight, args.perturb_exclude or [])
    ]
    if not selected:
        trainable = sum(weight.parameter.requires_grad for weight in weights)
        options = ("perturb_include", "perturb_exclude", "perturb_min_ndim")
        rule = f"{trainable} of {len(weights)} parameters are trainable, none of them is perturbed"
        cure = "Make parameters trainable, or widen these options"
        raise refusal("perturb_*", {o: getattr(args, o) for o in options}, rule, cure)
    for weight in selected:
        _check_can_carry_noise(weight)
    return selected


def _matches(weight: Weight, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, weight.name) for pattern in patterns)


def _check_can_carry_noise(weight: Weight) -> None:
    data = weight.data
    is_real = data.is_floating_point() and data.element_size() >= 2
    if not is_real or is_traceable_wrapper_subclass(data):
        rule = f"no noise can be added to a quantised {type(data).__name__} ({data.dtype})"
        cure = "Freeze it, leave it out with perturb_exclude, or train LoRA adapters on it"
        raise refusal("parameter", weight.name, rule, cure)
    if data.device.type == "meta":
        cure = "Load the model without offloading"
        raise refusal("parameter", weight.name, "has no storage (it is on the meta device)", cure)

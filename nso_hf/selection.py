"""Which weights are perturbed, and whether they can be."""

import re
from collections.abc import Sequence

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nso_hf.arguments import NSOArguments
from nso_hf.backends import Weight
from nso_hf.refusal import Refusal, refusal
from nso_hf.storage import without_aliases


def check_patterns(weights: Sequence[Weight], args: NSOArguments) -> None:
    """
    Raises:
        ValueError: a pattern of `args` matches none of all `weights` of a model.
    """
    for option in ("perturb_include", "perturb_exclude"):
        for pattern in getattr(args, option) or []:
            if not any(re.search(pattern, weight.name) for weight in weights):
                names = ", ".join(weight.name for weight in weights[:3])
                cure = f"Use part of a parameter's name, such as {names}"
                raise refusal(option, pattern, "matches no parameter", cure)


def select_perturbed(weights: Sequence[Weight], args: NSOArguments) -> list[Weight]:
    """The trainable ones among all `weights` of a model that the options of `args` select, each
    place in memory once.

    Raises:
        ValueError: one of them cannot carry noise, or shares a part of its memory with another.
    """
    selected = [
        weight
        for weight in weights
        if weight.parameter.requires_grad
        and len(weight.shape) >= args.perturb_min_ndim
        and (args.perturb_include is None or _matches(weight, args.perturb_include))
        and not _matches(weight, args.perturb_exclude or [])
    ]
    for weight in selected:
        _check_can_carry_noise(weight)
    return without_aliases(selected)


def nothing_to_perturb(weights: Sequence[Weight], args: NSOArguments) -> Refusal:
    """The error for a training in which `select_perturbed` selects none of all `weights`."""
    trainable = sum(weight.parameter.requires_grad for weight in weights)
    options = ("perturb_include", "perturb_exclude", "perturb_min_ndim")
    rule = f"{trainable} of {len(weights)} parameters are trainable, none of them is perturbed"
    cure = "Make parameters trainable, or widen these options"
    return refusal("perturb_*", {o: getattr(args, o) for o in options}, rule, cure)


def _matches(weight: Weight, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, weight.name) for pattern in patterns)


def _check_can_carry_noise(weight: Weight) -> None:
    data = weight.data
    if data.is_complex():
        rule = f"its elements are complex ({data.dtype}), the noise is real"
        cure = "Leave it out with perturb_exclude, or train its real and imaginary part"
        raise refusal("parameter", weight.name, rule, cure)
    is_real = data.is_floating_point() and data.element_size() >= 2
    if not is_real or is_traceable_wrapper_subclass(data):
        rule = f"no noise can be added to a quantised {type(data).__name__} ({data.dtype})"
        cure = "Freeze it, leave it out with perturb_exclude, or train LoRA adapters on it"
        raise refusal("parameter", weight.name, rule, cure)
    if data.device.type == "meta":
        cure = "Load the model without offloading"
        raise refusal("parameter", weight.name, "has no storage (it is on the meta device)", cure)

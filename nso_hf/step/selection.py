"""Which weights are perturbed, and whether they can be."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nso_hf.backends import Weight
from nso_hf.refusal import Refusal, check_integer, refusal
from nso_hf.step.storage import without_aliases


@dataclass
class SelectionOptions:
    """Which parameters are perturbed."""

    perturb_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions searched for in the parameters' names: perturb only those "
            "that match one. Default: every trainable parameter."
        },
    )
    perturb_exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions searched for in the parameters' names: never perturb "
            "those that match one."
        },
    )
    perturb_min_ndim: int = field(
        default=1,
        metadata={
            "help": "Perturb only parameters of at least this many dimensions; 2 leaves out biases "
            "and gains, 0 includes single numbers such as a temperature."
        },
    )

    def check_selection(self) -> None:
        """Raise a `ValueError` for a pattern that is none, or a number out of its range."""
        check_integer("perturb_min_ndim", self.perturb_min_ndim, 0, "2 means matrices only")
        for option in ("perturb_include", "perturb_exclude"):
            _check_are_patterns(option, getattr(self, option))


def check_patterns(weights: Sequence[Weight], args: SelectionOptions) -> None:
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


def parameters_beside(trainer: object, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters of modules that the trainer holds beside its model, as a loss with
    weights of its own: name, from that of the attribute, and parameter."""
    seen = {id(parameter) for parameter in model.parameters()}
    for attribute, value in vars(trainer).items():
        held = value if isinstance(value, dict) else {"": value}
        for key, module in held.items():
            if not isinstance(module, nn.Module):
                continue
            prefix = f"{attribute}.{key}" if key else attribute
            for name, parameter in module.named_parameters(prefix):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter


def trained_now(trainer: object) -> Iterator[tuple[int, bool, bool]]:
    """Of each parameter of all modules that the trainer holds: its id, whether it is trained, and
    whether there is a hook on its gradient."""
    held = [value for value in vars(trainer).values() if isinstance(value, (nn.Module, dict))]
    waiting = [
        module
        for each in held
        for module in (each.values() if isinstance(each, dict) else [each])
        if isinstance(module, nn.Module)
    ]
    seen = set()
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            waiting += filter(None, module._modules.values())
            for parameter in module._parameters.values():
                if parameter is not None:
                    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
                    yield id(parameter), parameter.requires_grad, bool(hooks)


def select_perturbed(
    weights: Sequence[Weight], args: SelectionOptions, frozen: bool = False
) -> list[Weight]:
    """The trainable ones among `weights`, or `frozen` ones too, that the options of `args` select,
    each place in memory once.

    Raises:
        ValueError: one of them cannot carry noise, or shares a part of its memory with another.
    """
    selected = [
        weight
        for weight in weights
        if (frozen or weight.parameter.requires_grad)
        and len(weight.shape) >= args.perturb_min_ndim
        and (args.perturb_include is None or _matches(weight, args.perturb_include))
        and not _matches(weight, args.perturb_exclude or [])
    ]
    for weight in selected:
        _check_can_carry_noise(weight)
    return without_aliases(selected)


def nothing_to_perturb(weights: Sequence[Weight], args: SelectionOptions) -> Refusal:
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


def _check_are_patterns(option: str, patterns: list[str] | None) -> None:
    if patterns is None:
        return
    are_strings = not isinstance(patterns, str) and all(isinstance(p, str) for p in patterns)
    if not are_strings or not patterns:
        cure = "Write it as ['attn', 'mlp']"
        raise refusal(option, patterns, "must be a list of regular expressions", cure)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            rule = f"{pattern!r} is not a regular expression ({error})"
            cure = "Escape special characters with a backslash"
            raise refusal(option, patterns, rule, cure) from error

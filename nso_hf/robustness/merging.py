"""One model from several that began with the same weights."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from nso_hf.refusal import check_range, refusal

Model = TypeVar("Model", bound=nn.Module)


def average(models: Sequence[Model]) -> Model:
    """The model whose weights are the means of these models' (a uniform soup; Wortsman et al.,
    arXiv 2203.05482).

    Raises:
        ValueError: there are none, or their weights have other names or shapes.
    """
    return _merged(models, lambda each: torch.stack(each).mean(dim=0))


def task_arithmetic(base: Model, models: Sequence[Model], *, scale: float) -> Model:
    """The model with the weights W_0 + scale sum_i (W_i - W_0), W_0 those of `base` (Ilharco et
    al., arXiv 2212.04089).

    Raises:
        ValueError: there are no `models`, their weights have other names or shapes, or `scale` is
            no finite number above 0.
    """
    check_range("scale", scale, 0, 10, "Typical: 0.3 to 1")
    if not models:
        raise refusal("models", [], "there are none", "Give at least one")

    def shifted(each: list[Tensor]) -> Tensor:
        first, *others = each
        return first + scale * sum((other - first for other in others), torch.zeros_like(first))

    return _merged([base, *models], shifted)


def _merged(models: Sequence[Model], of: Callable[[list[Tensor]], Tensor]) -> Model:
    """A copy of the first whose weights and buffers are some function of all models'; what is not a
    real number is that of the first."""
    if not models:
        raise refusal("models", [], "there are none", "Give at least one")
    check_mergeable({f"number {i}": model for i, model in enumerate(models, start=1)})
    states = [model.state_dict() for model in models]
    merged = deepcopy(models[0])
    with torch.no_grad():
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor.copy_(of([state[name].to(tensor.device, wide) for state in states]))
    return merged


def check_mergeable(models: Mapping[str, nn.Module]) -> None:
    """
    Raises:
        ValueError: weights of one of these, by their names, have other names or shapes than those
            of the first.
    """
    cure = "Merge models of one architecture"
    (first_name, first), *others = [(name, each.state_dict()) for name, each in models.items()]
    for name, other in others:
        if missing := sorted(first.keys() ^ other.keys()):
            rule = f"the weight {missing[0]} is not in both it and {first_name}"
            raise refusal("merge", name, rule, cure)
        for weight, tensor in first.items():
            if other[weight].shape != tensor.shape:
                rule = f"{weight} has the shape {list(other[weight].shape)}, and "
                rule += f"{list(tensor.shape)} in {first_name}"
                raise refusal("merge", name, rule, cure)

"""What a method remembers from step to step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nso_hf.backends import Weight
from nso_hf.refusal import refusal
from nso_hf.step.direction import Direction
from nso_hf.step.rows import RowFactors


class States:
    """Named directions that outlive a step: allocated when they are first asked for, as the
    weights are held, and saved with checkpoints, as the optimizer's are."""

    def __init__(self) -> None:
        self._directions: dict[str, dict[str, Tensor]] = {}  # name -> weight's name -> its tensor
        # Of the micro-batches of one optimizer step, until it is over.
        self.sums: dict[str, Direction] = {}
        self.rms: RowFactors | None = None

    def begin_step(self) -> None:
        """Forget what was of another step, which may have failed."""
        self.sums.clear()
        self.rms = None

    def __contains__(self, name: str) -> bool:
        return name in self._directions

    def get(
        self, name: str, weights: Sequence[Weight], first: float = 0.0, wide: bool = False
    ) -> Direction:
        """The direction of that name, to be read or written in place; every element is `first` at
        first, in the weight's type, or with `wide` in float32 at least.

        Raises:
            ValueError: it was loaded from a checkpoint of other weights.
        """
        if name not in self._directions:
            self._directions[name] = {
                w.name: torch.full_like(w.data, first, dtype=_type(w.data, wide)) for w in weights
            }
        tensors = self._directions[name]
        parts = []
        for weight in weights:
            tensor = tensors.get(weight.name)
            if tensor is None or tensor.shape != weight.data.shape:
                found = "none" if tensor is None else tuple(tensor.shape)
                rule = f"the checkpoint has {found} of {weight.name}, {tuple(weight.data.shape)}"
                cure = "Resume with the same weights and the same number of processes"
                raise refusal("resume_from_checkpoint", name, rule, cure)
            if tensor.device != weight.data.device:
                tensor = tensors[weight.name] = tensor.to(weight.data.device)
            parts.append(tensor)
        return Direction(parts)

    def state_dict(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self._directions

    def load_state_dict(self, directions: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._directions = {name: dict(tensors) for name, tensors in directions.items()}


def _type(data: Tensor, wide: bool) -> torch.dtype:
    return torch.promote_types(data.dtype, torch.float32) if wide else data.dtype

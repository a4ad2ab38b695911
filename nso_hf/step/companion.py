"""Callbacks that go along with a training of any method, and see more of it than the Trainer shows
them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from nso_hf.backends import Backend, Weight
from nso_hf.refusal import refusal


class Companion(TrainerCallback):
    """A callback of an NSO trainer, which lets it at the weights as this process holds them and at
    the gradient before it is clipped, and keeps its state in checkpoints as it does its own.

    Args:
        name: of its state in checkpoints; one trainer has no two of the same.

    Raises:
        ValueError: the name is none, or the method's.
    """

    def __init__(self, name: str) -> None:
        if not name.isidentifier() or name in ("method", "sigma", "rise"):
            rule = "must be an identifier, and 'method', 'sigma' and 'rise' are taken"
            raise refusal("name", name, rule, "Use a word, such as 'ema'")
        self.name = name
        self._trainer: Any = None

    def check(self, trainer: Any) -> None:
        """Raise a `ValueError` for an NSO trainer that it does not go with."""

    def join(self, trainer: Any) -> None:
        """Before a training: forget an earlier one."""
        self._trainer = trainer

    @property
    def trainer(self) -> Any:
        """The trainer that has taken it along.

        Raises:
            ValueError: no NSO trainer has taken it along.
        """
        if self._trainer is None:
            rule = "it needs the weights as each process holds them, which NSO trainers alone give"
            cure = "Use NSOTrainer, with sigma=0 for plain training, and train"
            raise refusal("callbacks", type(self).__name__, rule, cure)
        return self._trainer

    def held(self) -> tuple[Backend, list[Weight]]:
        """The trainable weights as this process holds them now."""
        backend, weights = self.trainer.nso_weights()
        return backend, [weight for weight in weights if weight.parameter.requires_grad]

    def add_to_gradient(self, loss_scale: float | Tensor) -> None:
        """When the gradient of an optimizer step is there, reduced, multiplied by `loss_scale` and
        not clipped yet, and the weights are at W: add to it."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold for it to go on from there, of this process's part."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; before the training begins."""


def companions_among(callbacks: Sequence[object]) -> list[Companion]:
    """
    Raises:
        ValueError: two of them have one name.
    """
    found = [callback for callback in callbacks if isinstance(callback, Companion)]
    names = [companion.name for companion in found]
    for name in names:
        if names.count(name) > 1:
            rule = f"two of them are called {name!r}"
            raise refusal("callbacks", names, rule, "Give each a name of its own, name='...'")
    return found


def check_steps_on_weights(option: str, optimizer: object) -> None:
    """
    Raises:
        ValueError: the optimizer moves the weights between training and evaluation.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    if callable(getattr(optimizer, "train", None)):
        rule = "it averages the weights itself, and has others in evaluation than in training"
        cure = f"Use another optimizer, or leave {option} out"
        raise refusal("optim", type(optimizer).__name__, rule, cure)

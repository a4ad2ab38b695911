"""What the rest of the library asks of a back end."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """The part of one parameter that this process holds.

    `data` is written in place and outside autograd. Its elements are those at the positions
    `start`, `start` + 1, ... of the whole parameter, flattened in row-major order and of `numel`
    elements; `index` numbers the parameters of the model, frozen ones included, in the order of
    `named_parameters()`.
    """

    name: str
    index: int
    parameter: nn.Parameter
    data: Tensor
    start: int
    numel: int


class Backend(ABC):
    """How one kind of run holds its weights and reduces its gradients."""

    rank: int
    """This replica's number, 0 to `num_replicas` - 1."""
    num_replicas: int
    """Replicas of the model that see different micro-batches."""

    @abstractmethod
    def weights(self, model: nn.Module) -> list[Weight]:
        """Every parameter of `model` (wrapped or not), tied ones once, as this process holds it."""

    @abstractmethod
    def accumulate_only(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, a backward pass adds to the local gradients and reduces nothing between
        processes."""

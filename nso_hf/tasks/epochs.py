"""Which pass over the data it is, told to what depends on it."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _ByEpoch(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class TellEpoch(TrainerCallback):
    """Tells a data set which epoch begins, or goes on after a checkpoint."""

    def __init__(self, data: _ByEpoch) -> None:
        self._data = data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # How many epochs are over; of the one that was begun, a fraction.
        self._data.set_epoch(int(state.epoch or 0))

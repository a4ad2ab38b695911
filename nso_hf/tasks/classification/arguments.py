"""The options of training classifiers: those of NSO, of training, and of mixup."""

from dataclasses import dataclass, field, fields
from typing import Any

from nso_hf.arguments import NSOConfig
from nso_hf.companions.mixup import MixupArguments, MixupTrainer
from nso_hf.refusal import refusal
from nso_hf.trainer import NSOTrainer


@dataclass
class ClassificationConfig(MixupArguments, NSOConfig):
    """`NSOConfig` with mixup where it is asked for."""

    _argument_group_name = "training"

    mixup: bool = field(
        default=False,
        metadata={"help": "Train on mixtures of two examples (mixup, arXiv 1710.09412)."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "After the warm-up."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Examples of one process in a forward pass."}
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Examples evaluated at a time."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in fields(MixupArguments):
            value = getattr(self, option.name)
            if not self.mixup and value != option.default:
                raise refusal(option.name, value, "has no effect", "Set --mixup true too")

    @property
    def trainer_class(self) -> type[NSOTrainer]:
        """With mixup or without."""
        trainer: type[Any] = MixupTrainer if self.mixup else NSOTrainer
        return trainer

    @property
    def seed_of_data(self) -> int:
        """What examples are dealt out and augmented by."""
        return self.seed if self.data_seed is None else self.data_seed

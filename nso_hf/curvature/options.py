"""Measurements of curvature as options of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import Trainer

from nso_hf.curvature.callback import CurvatureCallback
from nso_hf.refusal import refusal


@dataclass
class CurvatureOptions:
    _argument_group_name = "curvature"
    _may_change: ClassVar[tuple[str, ...]] = (  # when a run goes on: it changes no weight
        "curvature",
        "curvature_examples",
        "curvature_samples",
        "curvature_steps",
    )

    curvature: bool = field(
        default=False,
        metadata={
            "help": "Measure the trace and the largest eigenvalue of the Hessian of the training "
            "loss, by the trained weights, after training; log them as curvature/*."
        },
    )
    curvature_examples: int = field(
        default=16,
        metadata={"help": "Training examples it is measured on, in batches as in training."},
    )
    curvature_samples: int = field(
        default=20,
        metadata={"help": "Products with the Hessian for the trace; more make its error smaller."},
    )
    curvature_steps: int | None = field(
        default=None,
        metadata={"help": "Measure it before training too, and after each so many steps."},
    )

    def __post_init__(self) -> None:
        for option in ("curvature_examples", "curvature_samples", "curvature_steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise refusal(option, value, "must be at least 1", "Give a positive number")
        if self.curvature_steps is not None and not self.curvature:
            rule, cure = "has no effect without curvature", "Set --curvature true too"
            raise refusal("curvature_steps", self.curvature_steps, rule, cure)

    def callback(self, trainer: Trainer, examples: Any) -> CurvatureCallback | None:
        """What measures it on the first of these examples, a sequence, if anything does; what is
        measured after training is so by `measure`."""
        if not self.curvature:
            return None
        collate: Callable[[list[Any]], Any] = trainer.data_collator
        number = min(self.curvature_examples, len(examples))
        size = trainer.args.per_device_train_batch_size
        batches = [
            dict(collate([examples[i] for i in range(start, min(start + size, number))]))
            for start in range(0, number, size)
        ]
        return CurvatureCallback(
            trainer,
            batches,
            at_start=self.curvature_steps is not None,
            at_end=False,
            every_steps=self.curvature_steps,
            num_samples=self.curvature_samples,
            tolerance=1e-2,
        )

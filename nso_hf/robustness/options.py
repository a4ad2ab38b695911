"""What survives changes to the weights, as an option of a recipe."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn
from transformers import Trainer

from nso_hf.curvature.batches import Batch
from nso_hf.refusal import check_integer, refusal
from nso_hf.robustness.measuring import robustness
from nso_hf.running.sampling import places


@dataclass
class RobustnessOptions:
    _argument_group_name = "robustness"
    _may_change: ClassVar[tuple[str, ...]] = (  # when a run goes on: measured at its end
        "robustness",
        "robustness_examples",
    )

    robustness: bool = field(
        default=False,
        metadata={
            "help": "Measure on the test examples what survives quantisation, noise in the weights "
            "and pruning (as nso robustness does)."
        },
    )
    robustness_examples: int = field(
        default=1000, metadata={"help": "Of so many test examples, drawn at random."}
    )

    def __post_init__(self) -> None:
        check_integer("robustness_examples", self.robustness_examples, 1, "Typical: 1000")

    def check(self, backend: Any) -> None:
        """
        Raises:
            ValueError: the processes of this back end hold parts of the weights.
        """
        self._check_whole("robustness", backend)

    def _check_whole(self, option: str, backend: Any) -> None:
        value = getattr(self, option)
        if value and backend.num_copies < backend.num_processes:
            cure = "Leave it out, and measure the trained model with nso robustness"
            raise refusal(option, value, f"{backend.name} shards the weights", cure)

    def measure(self, trainer: Trainer, examples: Any, model: Any = None) -> list[dict[str, Any]]:
        """The rows of `robustness` on these examples, a sequence, or as many of them as are asked
        for, drawn at random.

        Args:
            model: measured in place of `merged(trainer)`.
        """
        collate: Callable[[list[Any]], Any] = trainer.data_collator
        chosen = places(self.robustness_examples, len(examples))
        size = trainer.args.per_device_eval_batch_size
        batches = [
            dict(collate([examples[place] for place in chosen[start : start + size]]))
            for start in range(0, len(chosen), size)
        ]
        measured = merged(trainer) if model is None else model
        return self.rows(measured, batches)

    def rows(self, model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """Those of `robustness`, as results have them."""
        return [asdict(row) for row in robustness(model, batches)]


def merged(trainer: Trainer) -> Any:
    """The model of a trainer; where it has adapters, a copy of what they make of its weights."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    return deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model

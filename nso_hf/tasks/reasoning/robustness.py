"""What a model still answers once its weights have changed, as options of a recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nso_hf.refusal import refusal
from nso_hf.robustness.options import RobustnessOptions, merged
from nso_hf.robustness.quantisation import check_bits, check_group_size, round_to_nearest
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.trainer import ReasoningTrainer


@dataclass
class AnswerRobustnessOptions(RobustnessOptions):
    _may_change = (*RobustnessOptions._may_change, "accuracy_in_bits", "accuracy_group_size")

    accuracy_in_bits: list[int] | None = field(
        default=None,
        metadata={
            "help": "Answer the test questions also with the trained weights rounded to nearest, "
            "in so many bits, one or several: 4 3."
        },
    )
    accuracy_group_size: int | None = field(
        default=None,
        metadata={"help": "Weights that share a scale there. Default: those of a row."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.accuracy_in_bits or []
        if len(set(asked)) < len(asked):
            raise refusal("accuracy_in_bits", asked, "has one twice", "Name each once")
        for bits in asked:
            check_bits(bits, "accuracy_in_bits")
        check_group_size(self.accuracy_group_size, "accuracy_group_size")
        if self.accuracy_group_size is not None and not self.accuracy_in_bits:
            rule, cure = "has no effect without accuracy_in_bits", "Set --accuracy_in_bits too"
            raise refusal("accuracy_group_size", self.accuracy_group_size, rule, cure)

    def check(self, backend: Any) -> None:
        super().check(backend)
        self._check_whole("accuracy_in_bits", backend)

    def measured(
        self, trainer: ReasoningTrainer, rows: Sequence[Any], test: Sequence[Example]
    ) -> Iterator[dict[str, Any]]:
        """What results.json has on the trained model, as it is found: `robustness`, of the loss per
        token on the first `rows`; and `accuracy_in_bits`, bits -> the summary of the answers to the
        test questions."""
        if not (self.robustness or self.accuracy_in_bits):
            return
        model = merged(trainer)  # one copy for all
        if self.robustness:
            yield {"robustness": self.measure(trainer, rows, model)}
        found: dict[str, dict[str, float]] = {}
        for bits in self.accuracy_in_bits or []:
            with round_to_nearest(model, bits=bits, group_size=self.accuracy_group_size):
                answers = trainer.answer(test, f"Test, in {bits} bits", model)
            found[str(bits)] = answers.summary()
            yield {"accuracy_in_bits": found}

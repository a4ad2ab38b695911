"""The options of fine-tuning a model and keeping what it could do before."""

from dataclasses import dataclass, field

from nso_hf.refusal import check_range, refusal
from nso_hf.tasks.clip.options import DataOptions, EvaluationOptions, ModelOptions


@dataclass
class FineTuningOptions:
    _argument_group_name = "fine-tuning"
    _may_change = ("eval_also", "wise_ft")  # when a run goes on: all is measured after training

    eval_also: list[str] | None = field(
        default=None,
        metadata={
            "help": "NAME=DATA, one or several: other images with classes, of which zero-shot "
            "accuracy is measured with the weights before training and after it."
        },
    )
    wise_ft: list[float] | None = field(
        default=None,
        metadata={
            "help": "Zero-shot accuracy on --zero_shot_data and --eval_also with weights between "
            "those before training (0) and after it (1), as 0 0.25 0.5 0.75 1 (WiSE-FT, arXiv "
            "2109.01903)."
        },
    )

    def __post_init__(self) -> None:
        self.also  # noqa: B018 - refuses
        for alpha in self.wise_ft or []:
            check_range("wise_ft", alpha, 0, 1, "Write --wise_ft 0 0.25 0.5 0.75 1")

    @property
    def also(self) -> dict[str, str]:
        """Name -> data."""
        named: dict[str, str] = {}
        for given in self.eval_also or []:
            name, equals, data = given.partition("=")
            if not (name and equals and data):
                raise refusal(
                    "eval_also", given, "must be NAME=DATA", "Write it as style=other.tar"
                )
            if name in named:
                rule = f"two collections are called {name!r}"
                raise refusal("eval_also", given, rule, "Give each a name of its own")
            named[name] = data
        return named

    def check(self, model: ModelOptions, data: DataOptions, evaluation: EvaluationOptions) -> None:
        """
        Raises:
            ValueError: the other options do not go with these.
        """
        if self.wise_ft and not (data.zero_shot_data and self.eval_also):
            cure = "Set --zero_shot_data and --eval_also"
            rule = "needs images of the task, and others to be kept"
            raise refusal("wise_ft", self.wise_ft, rule, cure)
        for option in ("eval_also", "wise_ft"):
            value = getattr(self, option)
            if value and not model.is_pretrained:
                rule = "training begins with random weights, which have learned nothing to keep"
                raise refusal(option, value, rule, "Set --pretrained, or --model local-dir:FOLDER")

"""What is measured before training and again after it."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nso_hf.running.paired import Measured, before_and_after
from nso_hf.tasks.reasoning.evaluation import Evaluation
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.further import FurtherSet
from nso_hf.tasks.reasoning.texts import losses, num_predicted
from nso_hf.tasks.reasoning.trainer import ReasoningTrainer

_TEST, _FURTHER = "before.json", "before_further.json"


class BeforeAndAfter(TrainerCallback):
    """The answers to the test questions, and further data sets.

    As a callback it measures before training, once the model is where, and sharded as, the back end
    wants it, and writes what it found to the output folder.

    Args:
        test: the questions; where there are none, further ones are not asked either.
        sets: further data.
        tests_before: whether test questions are asked before training too.
    """

    def __init__(
        self,
        trainer: ReasoningTrainer,
        test: Sequence[Example],
        sets: Sequence[FurtherSet],
        *,
        tests_before: bool = True,
    ) -> None:
        self._trainer, self._test = trainer, test
        self._sets = [found for found in sets if test or not _is_test(found)]
        self._tests_before = tests_before
        self._folder = Path(str(trainer.args.output_dir))
        self._test_before: dict[str, float] | None = None
        self._before: dict[str, Measured] = {}
        self.seconds = 0.0  # that measuring before training took

    def read(self, folder: Path) -> None:
        """What was measured before training in a run of that folder."""
        if (folder / _TEST).exists() and self._test:
            self._test_before = json.loads((folder / _TEST).read_text())
        if (folder / _FURTHER).exists():
            found = json.loads((folder / _FURTHER).read_text())
            self._before = {name: Measured(**measured) for name, measured in found.items()}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        began, when = time.monotonic(), "before training"
        asks = self._tests_before
        test = self._answered(when, "predictions_before.jsonl") if asks else None
        self._test_before = test.summary() if test is not None else None
        measured = [found for found in self._sets if asks or not _is_test(found)]
        self._before = {found.name: self._measured(found, when) for found in measured}
        if self._trainer.is_world_process_zero():
            if test is not None:
                (self._folder / _TEST).write_text(json.dumps(self._test_before, indent=2))
            if self._before:
                written = {name: asdict(measured) for name, measured in self._before.items()}
                (self._folder / _FURTHER).write_text(json.dumps(written))
        self.seconds = time.monotonic() - began

    def after(self) -> dict[str, Any]:
        """Measure again; what results.json has on both."""
        when = "after training"
        test = self._answered(when, "predictions.jsonl")
        further: dict[str, dict[str, Any]] = {"forgetting": {}, "also_test": {}}
        for found in self._sets:
            before, after = self._before.get(found.name), self._measured(found, when)
            figures = before_and_after(found.kind, found.measure, before, after)
            further[found.option.removesuffix("_data")][found.name] = figures
        summary = test.summary() if test is not None else None
        return {"before": self._test_before, "after": summary, **further}

    def _answered(self, when: str, file: str) -> Evaluation | None:
        if not self._test:
            return None
        answers = self._trainer.answer(self._test, f"Test, {when}")
        if self._trainer.is_world_process_zero():
            answers.write(self._folder / file)
        return answers

    def _measured(self, found: FurtherSet, when: str) -> Measured:
        trainer, description = self._trainer, f"{found.name}, {when}"
        if found.examples:
            answers = trainer.answer(found.examples, description).predictions
            return Measured([float(answer["correct"]) for answer in answers], [1] * len(answers))
        sums = iter(
            losses(
                trainer.model,  # type: ignore[arg-type]
                [piece for text in found.texts for piece in text],
                trainer.accelerator,
                batch_size=trainer.args.per_device_eval_batch_size,
                description=description,
            )
        )
        counts = [sum(map(num_predicted, text)) for text in found.texts]
        return Measured([sum(next(sums) for _ in text) for text in found.texts], counts)


def _is_test(found: FurtherSet) -> bool:
    return found.option == "also_test"

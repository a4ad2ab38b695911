"""Curvature in the training log."""

import time
from collections.abc import Iterable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nso_hf.curvature.batches import Batch, training_batches
from nso_hf.curvature.eigenvalues import check_tolerance, hessian_eigenvalues
from nso_hf.curvature.hessian import HVPS
from nso_hf.curvature.objective import Objective
from nso_hf.curvature.parameters import Selection
from nso_hf.curvature.trace import check_count, hessian_trace
from nso_hf.refusal import refusal


class CurvatureCallback(TrainerCallback):
    """Measures the trace and the largest eigenvalue of the Hessian during training, which goes on
    bit for bit as it would without.

        trainer.add_callback(CurvatureCallback(trainer, every_steps=500))

    Logged with the Trainer's own logs: `curvature/trace`, `curvature/trace_stderr`,
    `curvature/lambda_max`, `curvature/lambda_max_residual` (see `Eigenvalues.residuals`),
    `curvature/seconds`.

    Args:
        trainer: any `Trainer`, whose loss is measured, on all of its processes.
        batches: dicts as its collator makes them; by default the first `num_batches` of its
            training data.
        every_steps, every_epochs: measure after so many optimizer steps or epochs.
        at_start, at_end: measure before the first step, and after the last, with
            `load_best_model_at_end` the best model.
        num_samples: products with the Hessian for the trace.
        tolerance: of the largest eigenvalue, relative.
        params, hvp, seed: as in `hessian_trace`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterable[Batch] | None = None,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        num_batches: int = 4,
        num_samples: int = 20,
        tolerance: float = 1e-3,
        params: Selection = "trainable",
        hvp: str = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(trainer, Trainer):
            rule, cure = (
                "must be a Trainer",
                "Write trainer.add_callback(CurvatureCallback(trainer))",
            )
            raise refusal("trainer", type(trainer).__name__, rule, cure)
        for option, value in [("every_steps", every_steps), ("every_epochs", every_epochs)]:
            if value is not None:
                check_count(option, value)
        check_count("num_batches", num_batches)
        check_count("num_samples", num_samples)
        if hvp not in HVPS:
            raise refusal("hvp", hvp, "unknown", f"Choose one of {', '.join(map(repr, HVPS))}")
        check_tolerance(tolerance)
        self._trainer = trainer
        self._batches = None if batches is None else list(batches)
        self._num_batches = num_batches
        self._every_steps, self._every_epochs = every_steps, every_epochs
        self._at_start, self._at_end = at_start, at_end
        self._num_samples, self._tolerance = num_samples, tolerance
        self._options: dict[str, Any] = {"params": params, "hvp": hvp, "seed": seed}
        self._measured_at: int | None = None

    def measure(self) -> dict[str, float]:
        """The figures that are logged."""
        started = time.perf_counter()
        trainer, batches = self._trainer, self._prepared_batches()
        trace = hessian_trace(trainer, batches, num_samples=self._num_samples, **self._options)
        top = hessian_eigenvalues(trainer, batches, tolerance=self._tolerance, **self._options)
        return {
            "curvature/trace": trace.estimate,
            "curvature/trace_stderr": trace.stderr,
            "curvature/lambda_max": top.values[0],
            "curvature/lambda_max_residual": top.residuals[0],
            "curvature/seconds": time.perf_counter() - started,
        }

    def _prepared_batches(self) -> list[Batch]:
        if self._batches is None:
            self._batches = training_batches(self._trainer, self._num_batches)
        return self._batches

    def _log(self, step: int, control: TrainerControl) -> None:
        if self._measured_at != step:
            should_log = control.should_log
            self._trainer.log(self.measure())
            control.should_log = (
                should_log  # to log takes it back, and the loss would miss its turn
            )
            self._measured_at = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measured_at = None
        # What cannot be measured is refused now, not at the end of the training.
        objective = Objective(self._trainer, self._prepared_batches(), self._options["params"])
        with objective.opened():
            objective.check_gradient()
        if self._at_start and state.global_step == 0:
            self._log(0, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_due = self._every_steps and state.global_step % self._every_steps == 0
        # At the end while progress bars and trackers are there to see it.
        is_end = self._at_end and state.global_step == state.max_steps
        if is_due or (is_end and not args.load_best_model_at_end):
            self._log(state.global_step, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._every_epochs and round(state.epoch or 0) % self._every_epochs == 0:
            self._log(state.global_step, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._at_end:
            best = state.best_model_checkpoint or ""
            if args.load_best_model_at_end and not best.endswith(f"-{state.global_step}"):
                self._measured_at = None  # these are other weights than the last step's
            self._log(state.global_step, control)

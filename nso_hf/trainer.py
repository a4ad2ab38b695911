"""The Trainer with its gradient evaluated at displaced weights.

One training step is a loop over the method's points: displace the weights, call the Trainer's own
`training_step` with the loss of its backward pass scaled by the point's weight, go on.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.utils import logging

from nso_hf.arguments import NSOArguments, check_training
from nso_hf.automatic_sigma import AutomaticSigma
from nso_hf.backends import Backend, Weight, check, select
from nso_hf.curvature.batches import Batch, training_batches
from nso_hf.methods import Point, Step
from nso_hf.refusal import refusal
from nso_hf.step.companion import Companion, companions_among
from nso_hf.step.direction import Direction
from nso_hf.step.edits import edits_refused
from nso_hf.step.generation import check_generates_nothing, generation_refused
from nso_hf.step.kept import Keeps, load, load_renamed, save
from nso_hf.step.measurements import NORM, RISE, Measurements, norm_of
from nso_hf.step.perturbation import Perturbation, borrowed
from nso_hf.step.rates import check_can_be_slow, slow_down
from nso_hf.step.selection import (
    check_patterns,
    nothing_to_perturb,
    parameters_beside,
    trained_now,
)
from nso_hf.step.side_effects import SideEffects, copied
from nso_hf.step.sigma import AUTO
from nso_hf.step.states import States
from nso_hf.step.weighting import check_steps_afterwards, in_evaluation_mode, weighted_backward

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)

_FORWARD_SHARE = 1 / 3  # of the floating-point operations of a forward and backward pass


class NSOTrainerMixin(_Base):
    """Noise Stability Optimization for any `Trainer` subclass.

    Write `class MyTrainer(NSOTrainerMixin, SFTTrainer)`; it takes the arguments of the trainer it
    is mixed into. The options are read from `args` where that is an `NSOArguments`; plain training
    arguments get the defaults.

    Logged with the training loss: `nso/sigma` and `nso/perturbation_norm`, the Euclidean norm of
    the perturbation as applied to all weights, both of the first step since the last log; with
    `log_sharpness`, `nso/trace_estimate` of that step.

    Raises:
        ValueError: NSO would not compute what it says with this model, trainer or way of running.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__[: cls.__mro__.index(NSOTrainerMixin)]:
            bases = [base.__name__ for base in cls.__bases__]
            rule = "with NSOTrainerMixin behind the trainer its training_step is never called"
            cure = "Write class MyTrainer(NSOTrainerMixin, SomeTrainer)"
            raise refusal("bases", bases, rule, cure)
        # Of the class whose arguments it takes, for help, editors and other libraries.
        owner: Any = next(
            base for base in cls.__mro__ if "__init__" in vars(base) and base is not NSOTrainerMixin
        )
        parameters = list(inspect.signature(owner.__init__).parameters.values())
        cls.__signature__ = inspect.Signature(parameters[1:])

    __signature__: inspect.Signature

    if not TYPE_CHECKING:  # which sees the parameters of the trainer that it is mixed into

        def __init__(self, *args, **kwargs):
            self._nso_begin()
            super().__init__(*args, **kwargs)
            self._nso_select(self.model)
            for companion in self._nso_companions():
                companion.check(self)

    def _nso_begin(self) -> None:
        self._nso_defaults = NSOArguments()
        self._nso_micro_batch = 0  # of this process, within the optimizer step
        self._nso_all_weights: list[Weight] = []
        self._nso_weights: list[Weight] | None = None  # the perturbed ones
        self._nso_selected_from: list[object] = []
        self._nso_side_effects: SideEffects | None = None
        self._nso_measurements = Measurements()
        self._nso_point: Point | None = None  # where the weights are, within a training step
        self._nso_inputs: Any = None  # of this evaluation, prepared
        self._nso_further_passes = 0.0  # of this micro-batch, beside its last one
        self._nso_parked: Perturbation | None = None  # between the micro-batches of a step
        self._nso_parks = True
        self._nso_states = States()
        self._nso_automatic = AutomaticSigma()
        self._nso_loads_from = ""
        self._nso_is_awaited = False  # there is a batch, and no training step of it yet
        self._nso_is_first = True  # step of a training, or after an evaluation
        check_generates_nothing(type(self))

    @property
    def nso_args(self) -> NSOArguments:
        """The options in use."""
        return self.args if isinstance(self.args, NSOArguments) else self._nso_defaults

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Called when the trainer is built, and again after each trial of a hyperparameter search
        # has set its options.
        self.nso_args.check()
        check(self.accelerator)
        check_training(self.args)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Called once per optimizer step, for all its micro-batches.
        self._nso_check_was_called()
        if self.state.global_step >= self.state.max_steps:
            # The Trainer takes one more step where it resumes a training that ended in an epoch.
            self._nso_is_awaited = False
            self.control.should_training_stop = True
            return [], None
        self._nso_micro_batch = 0
        self._nso_parked = None  # it would be of a step that failed
        self._nso_states.begin_step()
        self._nso_measurements.begin(self.state.global_step)
        self._nso_find_sigma()
        result = super().get_batch_samples(*args, **kwargs)
        self._nso_is_awaited = bool(result[0])
        return result

    def _nso_find_sigma(self) -> None:
        """Before the first step in which the method is used, where sigma is found by its effect."""
        method, automatic = self.nso_args.chosen_method(), self._nso_automatic
        number, total = self.state.global_step, self.state.max_steps
        if self.nso_args.sigma == AUTO and automatic.value is None and method.acts(number, total):
            selected = self._nso_select_for_training(self.model_wrapped)
            own = len(list(self.nso_backend.module.parameters()))  # before those beside it
            weights = [weight for weight in selected if weight.index < own]
            automatic.find(self, self.nso_args, weights, self.nso_first_batches)

    def _nso_check_was_called(self) -> None:
        if self._nso_is_awaited and self.nso_args.chosen_method().displaces():
            rule = "it does not call super().training_step, where the method is: training is plain"
            cure = "Call it, or override compute_loss instead"
            raise refusal("training_step", type(self).__qualname__, rule, cure)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._nso_is_awaited, self._nso_is_first, self._nso_parks = False, True, True
        self._nso_states, self._nso_automatic = States(), AutomaticSigma()
        if self.model is not None:  # as in all trials of a hyperparameter search but the first
            self._nso_select_for_training(self.model)
        for companion in self._nso_companions():
            if self.model is not None:
                companion.check(self)
            companion.join(self)
        try:
            result = super().train(*args, **kwargs)
        finally:  # or they would outlive a model that is moved or made anew
            self._nso_weights, self._nso_all_weights, self._nso_side_effects = None, [], None
            self._nso_parked = None
            self._nso_states = States()
        self._nso_check_was_called()
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_given:
            check_can_be_slow(self._nso_innermost_optimizer(), self.model)
        else:
            slow_down(self._nso_innermost_optimizer(), self.model)
        self.nso_args.chosen_method().check_optimizer(self._nso_innermost_optimizer())
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.nso_args.sigma_hold:  # what was measured and not logged yet
            self._nso_measurements.settle(self.nso_backend.mean)
        if self.nso_backend.copy == 0:
            save(self._nso_kept(), output_dir, self.nso_backend.part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load(self._nso_kept(), checkpoint, self.nso_backend.part)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._nso_loads_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._nso_loads_from = str(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys and load_result.unexpected_keys:
            model = self.accelerator.unwrap_model(self.model)
            load_renamed(model, self._nso_loads_from, load_result.missing_keys)
        else:
            super()._issue_warnings_after_load(load_result)

    def _nso_kept(self) -> dict[str, Keeps]:
        """What has a state that checkpoints hold, by name."""
        remembers = self.nso_args.chosen_method().remembers
        kept: dict[str, Keeps] = {"method": self._nso_states} if remembers else {}
        if self.nso_args.sigma == AUTO:
            kept["sigma"] = self._nso_automatic
        if self.nso_args.sigma_hold:
            kept["rise"] = self._nso_measurements
        return kept | {companion.name: companion for companion in self._nso_companions()}

    def _nso_companions(self) -> list[Companion]:
        return companions_among(self.callback_handler.callbacks)

    def nso_weights(self) -> tuple[Backend, list[Weight]]:
        """Every weight of the model, and what is trained beside it, as this process holds it now,
        and the back end that says so."""
        backend = select(self.accelerator, self.model_wrapped)
        return backend, backend.weights(self._nso_beside(backend))

    def nso_first_batches(self, number: int) -> list[Batch]:
        """The first batches of the training data, the same in every process, on which sigma="auto"
        is found: for trainers to override whose data cannot be read twice.

        Raises:
            ValueError: they cannot.
        """
        return training_batches(self, number)

    def _prepare_inputs(self, inputs: Any) -> Any:
        # Once for all evaluations of a micro-batch, at W.
        return inputs if inputs is self._nso_inputs else super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        # The Trainer asks once after each training step, for the batch of that step.
        passes, self._nso_further_passes = 1 + self._nso_further_passes, 0.0
        return round(passes * super().floating_point_ops(inputs))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add the method's gradient of one micro-batch to `.grad`.

        What a base trainer does in its own `training_step` it does in every evaluation, at
        displaced weights.

        Returns:
            The loss to report, a detached scalar: for NSO the weighted mean over its evaluations.
        """
        self._nso_is_awaited, self._nso_further_passes = False, 0.0
        if not model.training:
            self._nso_is_first = True  # an evaluation came between
            model.train()
        if callable(switch := getattr(self.optimizer, "train", None)):
            switch()  # schedule-free optimizers edit the weights here: before they are backed up
        step = self._nso_step(model)
        inputs = super()._prepare_inputs(inputs)
        method = self.nso_args.chosen_method()
        backend = self.nso_backend
        with (
            backend.step_afterwards(),
            self._nso_borrowed(step) as perturbation,
            self._nso_in_a_step(),
        ):
            points = method.evaluations(step)
            point = next(points)
            if not point.last:
                backend.share_buffers()
            while True:
                perturbation.move_to(point.displacement, point.sign)
                self._nso_point = point
                if self._nso_measures_norm(step, point):
                    step.measurements[NORM] = norm_of(perturbation, step.weights)
                loss = self._nso_gradient_at(point, step, model, inputs, num_items_in_batch)
                try:
                    following = points.send(loss)
                except StopIteration as end:
                    assert point.last, "a method's final point must be marked as the last"
                    reported: Tensor = end.value
                    break
                assert not point.last, "a method went on after the point it marked as the last"
                point = following
        if self.accelerator.sync_gradients:
            for companion in self._nso_companions():
                companion.add_to_gradient(step.loss_scale)
            method.finish(step)
        self._nso_measurements.keep(step.measurements, step.number)
        self._nso_is_first = False
        return reported

    @contextmanager
    def _nso_borrowed(self, step: Step) -> Iterator[Perturbation]:
        """The weights; what a micro-batch parks is for the next one of its step."""
        used, self._nso_parked = self._nso_parked, None
        if used is None or not used.is_of(step.weights):
            used = Perturbation(step.weights, self.nso_backend, backup=self.nso_args.backup)
        goes_on = step.acts and not self.accelerator.sync_gradients
        parks = goes_on and self._nso_parks and self.nso_args.chosen_method().parks(step.weights)
        with borrowed(step.weights, self.nso_backend, used):
            yield used
            if parks:
                used.park(thoroughly=self._nso_is_first)
        self._nso_parks &= not used.was_edited
        self._nso_parked = used if parks else None

    @contextmanager
    def _nso_in_a_step(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._nso_point = self._nso_inputs = None

    def _nso_gradient_at(
        self,
        point: Point,
        step: Step,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """The Trainer's own step at the present weights, its gradient multiplied by the point's
        weight; returns the loss."""
        with ExitStack() as stack:
            if not point.last:
                self._nso_further_passes += 1 if point.weight or point.into else _FORWARD_SHARE
                stack.enter_context(self._nso_unnoticed(step, model, point))
            if not point.last or point.displacement is not None:
                every, displaced = self._nso_all_weights, step.weights
                stack.enter_context(edits_refused(every, displaced, self._nso_is_first))
                stack.enter_context(generation_refused(self.nso_backend.module))
            # A gradient apart is added to the others afterwards.
            weight = 1.0 if point.into is not None or callable(point.weight) else point.weight
            stack.enter_context(
                weighted_backward(self.accelerator, weight, type(self), point.penalty)
            )
            if point.forward_only:
                stack.enter_context(torch.no_grad())
                stack.enter_context(in_evaluation_mode(model))
            # `compute_loss` may pop the labels, or edit what it was given.
            self._nso_inputs = copy.copy(inputs) if point.last else copied(inputs)
            loss = super().training_step(model, self._nso_inputs, num_items_in_batch)
        return loss if loss.dtype == torch.float64 else loss.float()

    @contextmanager
    def _nso_unnoticed(self, step: Step, model: nn.Module, point: Point) -> Iterator[None]:
        """For a pass that another will follow: it adds to the gradients, and leaves nothing else
        behind."""
        keeps_random_state = self.nso_args.common_random_numbers or not (point.weight or point.into)
        devices = {self.accelerator.device, *(weight.data.device for weight in step.weights)}
        if self._nso_side_effects is None:
            self._nso_side_effects = SideEffects(self, model)
        with self._nso_side_effects.undone(devices, keeps_random_state):
            if point.into is None:
                with self.nso_backend.accumulate_only(is_first=self._nso_micro_batch == 1):
                    yield
            else:
                with self._nso_apart(point, point.into, step):
                    yield

    @contextmanager
    def _nso_apart(self, point: Point, into: Direction, step: Step) -> Iterator[None]:
        # The loss of a micro-batch is its share of the step's, times the loss scale.
        scale = step.micro_batches / step.loss_scale

        def receive(parts: list[Tensor]) -> float:
            into.parts, into.scale = parts, scale
            return point.weight() if callable(point.weight) else point.weight

        with self.nso_backend.apart(step.weights, receive):
            yield
        if not isinstance(scale, float) or scale != 1:
            torch._foreach_mul_(into.parts, scale)
        into.scale = 1.0

    def _nso_loss_scale(self) -> float | Tensor:
        """What gradients are multiplied by, in half precision."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None:
            return 1.0
        scale: Tensor = scaler.scale(torch.ones((), device=self.accelerator.device))
        return scale

    def _nso_select(self, model: nn.Module) -> list[Weight]:
        self.nso_backend: Backend = select(self.accelerator, model)
        accumulation, copies = self.args.gradient_accumulation_steps, self.nso_backend.num_copies
        method = self.nso_args.chosen_method()
        method.check_micro_batches(accumulation, copies)
        method.check_backend(self.nso_backend)
        if method.reads_gradients:
            self.nso_backend.check_keeps_gradients_apart(self.nso_args.method)
        self._nso_all_weights = self.nso_backend.weights(self._nso_beside(self.nso_backend))
        check_patterns(self._nso_all_weights, self.nso_args)
        if not method.displaces():
            return []
        check_steps_afterwards((weight.name, weight.parameter) for weight in self._nso_all_weights)
        return method.selected(self._nso_all_weights, self.nso_backend.module, self.nso_args)

    def _nso_beside(self, backend: Backend) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer updates beside the model: at first, what it may."""
        beside = list(parameters_beside(self, backend.module))
        if not beside or self.optimizer is None:
            return beside
        optimised = backend.optimised(self.optimizer)
        return [(name, parameter) for name, parameter in beside if id(parameter) in optimised]

    def _nso_select_for_training(self, model: nn.Module) -> list[Weight]:
        selected = self._nso_select(model)
        if not selected and self.nso_args.chosen_method().displaces():
            raise nothing_to_perturb(self._nso_all_weights, self.nso_args)
        return selected

    def _nso_step(self, model: nn.Module) -> Step:
        if self._nso_weights is None or self._nso_is_stale(self._nso_weights):
            self._nso_weights = self._nso_select_for_training(model)
            self._nso_selected_from = self._nso_selects_from()
            self.nso_backend.check_prepared()
        backend, number = self.nso_backend, self.state.global_step
        step = Step(
            seed=self.args.seed,
            number=number,
            sigma=self._nso_sigma(),
            acts=self.nso_args.chosen_method().acts(number, self.state.max_steps),
            progress=min(1.0, (number + 1) / max(1, self.state.max_steps)),
            micro_batches=self.current_gradient_accumulation_steps,
            micro_batch=self._nso_micro_batch * backend.num_copies + backend.copy,
            weights=self._nso_weights,
            all_weights=self._nso_all_weights,
            model=backend.module,
            is_measured=self._nso_measurements.wanted_of(number),
            backend=backend,
            states=self._nso_states,
            optimizer=self._nso_innermost_optimizer(),
            loss_scale=self._nso_loss_scale(),
        )
        self._nso_micro_batch += 1
        return step

    def _nso_sigma(self) -> float:
        sigma = self.nso_args.sigma
        return float(sigma or 0) if sigma != AUTO else self._nso_automatic.value or 0.0

    def _nso_is_stale(self, selected: list[Weight]) -> bool:
        """Whether what is perturbed has to be looked up again: in each optimizer step, but where
        that is seen to find the same."""
        if not self.nso_backend.holds(selected):
            return True
        is_first = self._nso_micro_batch == 0
        stays = self.nso_backend.stays
        return is_first and not (stays and self._nso_selected_from == self._nso_selects_from())

    def _nso_selects_from(self) -> list[object]:
        """What decides about it: the parameters, those of them that are trained, and options."""
        options = [getattr(self.nso_args, option.name) for option in fields(NSOArguments)]
        return [*options, self.args.gradient_accumulation_steps, *trained_now(self)]

    def _nso_innermost_optimizer(self) -> Any:
        optimizer = self.optimizer
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        return optimizer

    def _nso_measures_norm(self, step: Step, point: Point) -> bool:
        is_new = NORM not in step.measurements and self._nso_measurements.lacks(NORM)
        return step.is_measured and point.displacement is not None and is_new

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs and self._nso_weights is None:
            logger.warning(
                f"Nothing was left to train: step {self.state.global_step} was the last."
            )
            return
        if "loss" in logs:
            self._nso_measurements.move_into(logs, self.nso_backend.mean)
            if RISE in logs:
                self._nso_automatic.hold(logs[RISE])
        super().log(logs, *args, **kwargs)


class NSOTrainer(NSOTrainerMixin, Trainer):
    """`transformers.Trainer` with Noise Stability Optimization: same arguments, same behaviour.

    `args` is an `NSOConfig`, or a `TrainingArguments` for NSO's defaults. See `NSOTrainerMixin`.
    """


class NSOSeq2SeqTrainer(NSOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Noise Stability Optimization.

    `args` is an `NSOSeq2SeqConfig`, or a `Seq2SeqTrainingArguments` for NSO's defaults. See
    `NSOTrainerMixin`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        if not isinstance(self.args, Seq2SeqTrainingArguments):
            rule = "Seq2SeqTrainer reads options that only Seq2SeqTrainingArguments has"
            raise refusal("args", type(self.args).__name__, rule, "Use NSOSeq2SeqConfig")
        super().create_accelerator_and_postprocess()

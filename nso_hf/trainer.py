"""The Trainer with its gradient evaluated at displaced weights: a loop of `super().training_step` over points."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from nso_hf.arguments import NSOArguments
from nso_hf.backends import Backend, Weight, select
from nso_hf.methods import METHODS, Point, Step
from nso_hf.perturbation import Perturbation, borrowed
from nso_hf.refusal import refusal
from nso_hf.side_effects import without_side_effects

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)

_GENERATING = re.compile(
    r"(GRPO|A2PO|GMPO|RLOO|PPO|Distillation|GKD|GOLD|MiniLLM|OnlineDPO|NashMD|XPO|SDFT|SDPO)\w*Trainer$",
    re.I,
)
"""Trainers that generate, or count steps, inside `training_step`: several calls per micro-batch break them."""

_FORWARD_SHARE = 1 / 3  # of the floating-point operations of a forward and backward pass


class NSOTrainerMixin(_Base):
    """Noise Stability Optimization for any `Trainer` subclass: `class MyTrainer(NSOTrainerMixin, SFTTrainer)`.

    Takes the arguments of the trainer it is mixed into. The options are read from `args` where that is an
    `NSOArguments`; plain training arguments get the defaults.

    Logged with the training loss: `nso/sigma` and `nso/perturbation_norm`, the Euclidean norm of the perturbation as
    applied to all weights, in the first step since the last log; `nso/trace_estimate` of the same step with
    `log_sharpness`.

    Raises:
        ValueError: NSO would not compute what it says with this model, trainer or way of running.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(NSOTrainerMixin)]
        if Trainer in before:
            bases = [base.__name__ for base in cls.__bases__]
            rule = (
                "NSOTrainerMixin must come before the trainer, or its training_step is never called"
            )
            raise refusal(
                "bases", bases, rule, "Write class MyTrainer(NSOTrainerMixin, SomeTrainer)"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._nso_defaults = NSOArguments()
        self._nso_micro_batch = 0  # of this process, within the optimizer step
        self._nso_weights: list[Weight] | None = (
            None  # the perturbed ones, found anew in each optimizer step
        )
        self._nso_measured_step: int | None = None  # whose measurements go into the next log
        self._nso_measurements: dict[str, float | Tensor] = {}
        for name in (base.__name__ for base in type(self).__mro__):
            if _GENERATING.match(name):
                rule = "it generates inside training_step and counts its calls, so that NSO's evaluations would differ"
                raise refusal(
                    "trainer",
                    name,
                    rule,
                    "Use a trainer whose training_step is one forward and backward pass",
                )
        super().__init__(*args, **kwargs)
        self._nso_perturbed()

    @property
    def nso_args(self) -> NSOArguments:
        """The options in use."""
        return self.args if isinstance(self.args, NSOArguments) else self._nso_defaults

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Runs when the trainer is built and again in each trial of a hyperparameter search, which sets options.
        self.nso_args.check()
        self.nso_backend: Backend = select(self.accelerator)
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            rule = "it updates the weights during the backward pass, while they are perturbed"
            raise refusal(
                "optim",
                optim,
                rule,
                "Use an optimizer that steps after it, as adamw_torch or adafactor",
            )
        if self.args.n_gpu > 1:
            rule = "DataParallel copies the weights to every GPU in each forward pass"
            raise refusal(
                "n_gpu",
                self.args.n_gpu,
                rule,
                "Launch one process per GPU with torchrun, or show it one GPU",
            )
        METHODS[self.nso_args.method].check_micro_batches(
            self.nso_args, self.args.gradient_accumulation_steps, self.nso_backend.num_replicas
        )

    def _nso_perturbed(self) -> list[Weight]:
        """The trainable weights that the name patterns select."""
        args = self.nso_args
        weights = self.nso_backend.weights(self.model)
        for option in ("perturb_include", "perturb_exclude"):
            for pattern in getattr(args, option) or []:
                if not any(re.search(pattern, weight.name) for weight in weights):
                    names = ", ".join(weight.name for weight in weights[:3])
                    raise refusal(
                        option,
                        pattern,
                        "matches no parameter",
                        f"Use part of a parameter's name, such as {names}",
                    )
        selected = [
            weight
            for weight in weights
            if weight.parameter.requires_grad
            and weight.parameter.ndim >= args.perturb_min_ndim
            and (
                not args.perturb_include
                or any(re.search(p, weight.name) for p in args.perturb_include)
            )
            and not any(re.search(p, weight.name) for p in args.perturb_exclude or [])
        ]
        if not selected:
            trainable = sum(weight.parameter.requires_grad for weight in weights)
            rule = f"{trainable} of {len(weights)} parameters are trainable and none of them is perturbed"
            options = {
                o: getattr(args, o)
                for o in ("perturb_include", "perturb_exclude", "perturb_min_ndim")
            }
            raise refusal(
                "perturb_*", options, rule, "Make parameters trainable, or widen these options"
            )
        for weight in selected:
            _check_can_carry_noise(weight)
        return selected

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Called once per optimizer step, for all its micro-batches.
        self._nso_micro_batch = 0
        self._nso_weights = None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add the method's gradient of one micro-batch to `.grad`; return the loss to report, a detached scalar."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers edit the weights here: before they are backed up
        step = self._nso_step()
        points = METHODS[self.nso_args.method](self.nso_args).points(step)
        with borrowed(step.weights) as perturbation:
            point = next(points)
            while True:
                perturbation.move_to(point.displacement, point.sign)
                if (
                    step.is_measured
                    and point.displacement
                    and "nso/perturbation_norm" not in step.measurements
                ):
                    step.measurements["nso/perturbation_norm"] = _measured_norm(
                        step.weights, perturbation
                    )
                loss = self._nso_gradient_at(point, step, model, inputs, num_items_in_batch)
                try:
                    following = points.send(loss)
                except StopIteration as end:
                    assert point.last, "a method's final point must be marked as the last"
                    self._nso_keep(step)
                    return end.value
                assert not point.last, "a method went on after the point it marked as the last"
                point = following

    def _nso_step(self) -> Step:
        if self._nso_weights is None:
            self._nso_weights = self._nso_perturbed()
        number = self.state.global_step
        step = Step(
            seed=self.args.seed,
            number=number,
            progress=min(1.0, (number + 1) / self.state.max_steps)
            if self.state.max_steps > 0
            else 1.0,
            micro_batch=self._nso_micro_batch * self.nso_backend.num_replicas + self.nso_backend.rank,
            weights=self._nso_weights,
            is_measured=self._nso_measured_step is None or self._nso_measured_step == number,
        )
        self._nso_micro_batch += 1
        return step

    def _nso_keep(self, step: Step) -> None:
        for name, value in step.measurements.items():
            self._nso_measured_step = step.number
            # A micro-batch's loss is its share of the step's: tensors made of losses add up.
            earlier = self._nso_measurements.get(name)
            self._nso_measurements[name] = earlier + value if isinstance(earlier, Tensor) else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, value in self._nso_measurements.items():
                if isinstance(value, Tensor):
                    value = self.accelerator.reduce(value, "mean").item()
                logs[name] = value
            self._nso_measurements, self._nso_measured_step = {}, None
        super().log(logs, *args, **kwargs)

    def _nso_gradient_at(
        self,
        point: Point,
        step: Step,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """The Trainer's own step at the present weights: returns the loss, adds `point.weight` times its gradient."""
        with ExitStack() as stack:
            if not point.last:
                keep_random_state = self.nso_args.common_random_numbers or point.weight == 0
                devices = {weight.data.device for weight in step.weights}
                stack.enter_context(without_side_effects(self, model, devices, keep_random_state))
                stack.enter_context(self.nso_backend.accumulate_only(model))
                share = 1 if point.weight else _FORWARD_SHARE
                self.current_flos += share * float(self.floating_point_ops(inputs))
            if point.weight == 0:
                stack.enter_context(torch.no_grad())
            stack.enter_context(self._nso_weighted_backward(point.weight))
            # A shallow copy, since `compute_loss` may pop the labels.
            return super().training_step(model, copy.copy(inputs), num_items_in_batch).float()

    @contextmanager
    def _nso_weighted_backward(self, weight: float) -> Iterator[None]:
        """Inside, `accelerator.backward` multiplies the loss by `weight`; the loss that is reported stays as it is."""
        own = vars(self.accelerator).get("backward")
        backward = self.accelerator.backward

        def weighted(loss: Tensor, **kwargs: Any) -> None:
            if weight:
                backward(loss if weight == 1 else loss * weight, **kwargs)

        self.accelerator.backward = weighted
        try:
            yield
        finally:
            if own is None:
                del self.accelerator.backward
            else:
                self.accelerator.backward = own


def _measured_norm(weights: Sequence[Weight], perturbation: Perturbation) -> float:
    norm, moved = perturbation.measure()
    if moved < 0.5:
        dtypes = {str(weight.data.dtype).removeprefix("torch.") for weight in weights}
        logger.warning_once(
            f"Only {moved:.0%} of the perturbed weights changed: {' and '.join(sorted(dtypes))} cannot carry noise as "
            "small as sigma. Load the model in float32 (with bf16=True for mixed precision), or raise sigma."
        )
    return norm


def _check_can_carry_noise(weight: Weight) -> None:
    data = weight.data
    if (
        not data.is_floating_point()
        or data.element_size() < 2
        or is_traceable_wrapper_subclass(data)
    ):
        kind = f"{type(data).__name__} of {data.dtype}"
        cure = "Freeze it, leave it out with perturb_exclude, or train LoRA adapters on it"
        raise refusal(
            "parameter",
            weight.name,
            f"quantised or sharded ({kind}), so that no noise can be added",
            cure,
        )
    if data.device.type == "meta":
        raise refusal(
            "parameter",
            weight.name,
            "has no storage (meta device)",
            "Load the model's weights first",
        )


class NSOTrainer(NSOTrainerMixin, Trainer):
    """`transformers.Trainer` with Noise Stability Optimization: same arguments, same behaviour.

    `args` is an `NSOConfig`, or a `TrainingArguments` for NSO's defaults. See `NSOTrainerMixin`.
    """


class NSOSeq2SeqTrainer(NSOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Noise Stability Optimization. See `NSOTrainerMixin`."""

"""Averages of the weights along the path of training, by `torch.optim.swa_utils`."""

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from nso_hf.backends import Backend, Weight
from nso_hf.refusal import check_integer, check_range, refusal
from nso_hf.step.companion import Companion, check_steps_on_weights
from nso_hf.step.counts import counts_kept
from nso_hf.step.generators import generators_of
from nso_hf.step.perturbation import borrowed
from nso_hf.step.side_effects import Buffers, random_state_kept
from nso_hf.step.states import States

logger = logging.get_logger(__name__)

Update = Callable[[list[Tensor], list[Tensor], int], None]
"""Of the averages, by the weights now, after so many of them."""


class AveragingCallback(Companion):
    """An average of the trainable weights, in float32 at least, which training itself does not see.

    It is taken after optimizer steps, of the weights W themselves, whatever the method. Each
    process keeps the average of the part that it holds.

        with callback.averaged():
            trainer.save_model("out/average")

    Args:
        update: of the average, as those of `torch.optim.swa_utils`.
        start: share of training before the first step that counts, in [0, 1).
        every_steps: from there on, every so manieth step counts.
        evaluate: before each evaluation of the weights, evaluate the average too; its metrics are
            called `eval_NAME_loss` and so on.
        apply_at_end: leave the average in the model when training ends, instead of the weights.
        update_bn: measure the statistics of BatchNorm layers anew for the average, by `update_bn`
            in one pass over the training data, wherever the average is put in the model.
        name: of the average in metrics and checkpoints.

    Raises:
        ValueError: an option is out of its range or does not go with the trainer's.
    """

    def __init__(
        self,
        update: Update,
        *,
        name: str,
        start: float = 0.0,
        every_steps: int = 1,
        evaluate: bool = False,
        apply_at_end: bool = False,
        update_bn: bool = True,
    ) -> None:
        super().__init__(name)
        check_range("start", start, 0, 1, "2/3 averages over the last third of training")
        if start == 1:
            raise refusal("start", start, "nothing would be averaged", "Try 2/3")
        check_integer("every_steps", every_steps, 1, "1 counts every step")
        self._update, self._start, self._every_steps = update, start, every_steps
        self._evaluates, self._applies, self._updates_bn = evaluate, apply_at_end, update_bn
        self._average, self.count = States(), 0

    count: int
    """Weights averaged so far."""

    def check(self, trainer: Any) -> None:
        if self._applies and trainer.args.load_best_model_at_end:
            rule = "load_best_model_at_end puts another model there when training ends"
            cure = "Leave one of them out, and use averaged() for the average"
            raise refusal("apply_at_end", True, rule, cure)
        if self._evaluates and str(getattr(trainer.args.eval_strategy, "value", "")) == "no":
            rule = "eval_strategy='no' evaluates nothing during training"
            raise refusal("evaluate", True, rule, "Set eval_strategy='steps' or 'epoch'")
        data = trainer.train_dataset
        is_stream = data is not None and not isinstance(data, Sized)
        if self._updates_bn and is_stream and _batch_norms(trainer.model):
            rule = "BatchNorm's statistics take a pass over training data that has no length"
            raise refusal("update_bn", True, rule, "Set update_bn=False")

    def join(self, trainer: Any) -> None:
        super().join(trainer)
        self._average, self.count = States(), 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "average": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self._average.load_state_dict(state["average"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the average; the weights, statistics of BatchNorm included, come
        back bit for bit. On all processes at once.

        Raises:
            ValueError: nothing has been averaged yet.
        """
        backend, weights = self.held()
        average = self._parts(weights)
        with ExitStack() as stack:
            if self._updates_bn and _batch_norms(backend.module):
                stack.enter_context(Buffers(backend.module).kept())
            stack.enter_context(borrowed(weights, backend)).move_to(_To(average))
            self._measure_statistics(backend)
            yield

    def apply(self) -> None:
        """Put the average in the model for good. On all processes at once.

        Raises:
            ValueError: nothing has been averaged yet.
        """
        backend, weights = self.held()
        _To(self._parts(weights)).add_to(weights)
        self._measure_statistics(backend)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_steps_on_weights(type(self).__name__, self.trainer.optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        since = state.global_step - 1 - math.ceil(self._start * state.max_steps)
        if since >= 0 and since % self._every_steps == 0:
            self._take()
        self._evaluate_if_due(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluate_if_due(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._applies and self.count:
            self.apply()
        elif self._applies:
            logger.warning(f"Training ended before {self.name!r} averaged anything: none applied.")

    def _take(self) -> None:
        _, weights = self.held()
        average = self._average.get("average", weights, wide=True).parts
        now = [weight.data.to(part.dtype) for weight, part in zip(weights, average, strict=True)]
        if self.count == 0:
            torch._foreach_copy_(average, now)
        else:
            self._update(average, now, self.count)
        self.count += 1

    def _parts(self, weights: Sequence[Weight]) -> list[Tensor]:
        if self.count == 0:
            cure = "Train beyond its start, or set an earlier one"
            raise refusal("average", self.name, "nothing has been averaged yet", cure)
        return self._average.get("average", weights, wide=True).parts

    def _evaluate_if_due(self, control: TrainerControl) -> None:
        if not (self._evaluates and control.should_evaluate and self.count):
            return
        trainer, before = self.trainer, (control.should_log, control.should_evaluate)
        generators = generators_of(trainer.model, trainer)
        with random_state_kept({trainer.args.device}, generators), self.averaged():
            trainer.evaluate(metric_key_prefix=f"eval_{self.name}")
        # To log and to evaluate takes them back.
        control.should_log, control.should_evaluate = before

    def _measure_statistics(self, backend: Backend) -> None:
        trainer, module = self.trainer, backend.module
        norms = _batch_norms(module)
        if not (self._updates_bn and norms):
            return
        generators = generators_of(trainer.model, trainer)
        momenta = [norm.momentum for norm in norms]
        try:
            with random_state_kept({trainer.args.device}, generators), counts_kept(trainer):
                update_bn(trainer.get_train_dataloader(), _OnBatches(trainer, module))
        finally:  # as update_bn does, but for an exception
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        backend.discard_gathered()
        for buffer in (b for norm in norms for b in (norm.running_mean, norm.running_var)):
            if buffer is not None:  # each process has seen its share of the data
                buffer.copy_(backend.mean(buffer))


class EMACallback(AveragingCallback):
    """The exponential moving average of the weights,

        A_1 = W_1,    A_t = decay A_(t-1) + (1 - decay) W_t

    with W_t those after the t-th step that counts.

    Args:
        decay: in [0, 1); the average is over the last 1/(1 - decay) steps or so.
        options: those of `AveragingCallback`.
    """

    def __init__(self, decay: float = 0.999, *, name: str = "ema", **options: Any) -> None:
        check_range("decay", decay, 0, 1, "Typical values are 0.99 to 0.9999")
        if decay == 1:
            raise refusal("decay", decay, "the average would never move", "Try 0.999")
        super().__init__(get_ema_multi_avg_fn(decay), name=name, **options)


class SWACallback(AveragingCallback):
    """Stochastic Weight Averaging (Izmailov et al.; UAI 2018, arXiv 1803.05407): the mean of the
    weights after each step that counts.

    The learning rate is the trainer's: the paper's is constant, or cyclic, from `start` on.

    Args:
        start: share of training before the first weights that count, in [0, 1).
        options: those of `AveragingCallback`.
    """

    def __init__(self, *, start: float = 2 / 3, name: str = "swa", **options: Any) -> None:
        super().__init__(get_swa_multi_avg_fn(), name=name, start=start, **options)


@dataclass(eq=False)
class _To:
    """The displacement to other weights."""

    parts: list[Tensor]

    def add_to(self, weights: Sequence[Weight]) -> None:
        torch._foreach_copy_([weight.data for weight in weights], self.parts)


class _OnBatches(nn.Module):
    """The forward pass of a trainer's loss as a module of one input, a batch."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self._trainer = trainer

    def forward(self, batch: Any) -> None:
        self._trainer.compute_loss(self.model, self._trainer._prepare_inputs(batch))


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]

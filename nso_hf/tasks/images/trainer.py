"""The Trainer of masked autoencoders, whose loss has a term of the task to come."""

from typing import Any

from torch import Tensor, nn

from nso_hf.refusal import refusal
from nso_hf.tasks.images.arguments import MAEConfig
from nso_hf.tasks.images.dataset import WithTargetImages
from nso_hf.tasks.images.rademacher import representation_regularization
from nso_hf.trainer import NSOTrainer


class MAETrainer(NSOTrainer):
    """`NSOTrainer` for `ViTMAEForPreTraining` whose loss in training is

        L_pretrain + lambda R E_s || (1/n) sum_i s_i h(x_i) ||     (arXiv 2403.06871)

    with x_1 ... x_n the target images of one micro-batch of one process: the term of a step is the
    mean over its micro-batches and processes, each with signs of its own. So n, and with it the
    size of the term, is set by `per_device_train_batch_size`, and not by accumulation or the number
    of processes.

    All evaluations of a micro-batch have the same target images, which are part of the batch, and
    (with `common_random_numbers`) the same masks and signs, which are drawn from torch's global
    generator. The complexity, without lambda, is logged as `rademacher/complexity`.

    The loss of evaluation is L_pretrain alone, with random masks.

    Args:
        args: a `MAEConfig`.
        train_dataset: with `args.rademacher_strength`, `WithTargetImages`.

    Raises:
        ValueError: as `NSOTrainer`; or there are no target images, or fewer than in a batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._complexity: Tensor | None = None
        self.can_return_loss = True  # there are no labels that tell the Trainer so
        strength = self.options.rademacher_strength
        if not strength or self.train_dataset is None:
            return
        if not isinstance(self.train_dataset, WithTargetImages):
            kind = type(self.train_dataset).__name__
            rule = f"the training images ({kind}) come without images of the task to come"
            raise refusal("rademacher_strength", strength, rule, "Use WithTargetImages, or 0")
        size, there = self.args.per_device_train_batch_size, len(self.train_dataset.targets)
        if size > there:
            rule = f"there are {there} target images, of which a batch has as many different ones"
            raise refusal("per_device_train_batch_size", size, rule, f"Use at most {there}")

    @property
    def options(self) -> MAEConfig:
        """`args`."""
        if not isinstance(self.args, MAEConfig):
            rule = "it has no options of masked autoencoders"
            raise refusal("args", type(self.args).__name__, rule, "Use MAEConfig")
        return self.args

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        loss, h = outputs["loss"], outputs.get("representations")
        if h is not None:
            complexity = representation_regularization(
                h,
                num_draws=self.options.rademacher_draws,
                radius=self.options.rademacher_radius,
            )
            self._complexity = complexity.detach()
            loss = loss + self.options.rademacher_strength * complexity
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._complexity is not None:
            logs["rademacher/complexity"] = self._complexity.item()
        super().log(logs, *args, **kwargs)

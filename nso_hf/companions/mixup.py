"""Mixup (Zhang et al.; ICLR 2018, arXiv 1710.09412): train on mixtures of two examples.

    x = lambda x_i + (1 - lambda) x_j,    lambda ~ Beta(alpha, alpha)
    loss = lambda CE(f(x), y_i) + (1 - lambda) CE(f(x), y_j)

with j a permutation of the micro-batch, whose lambda and permutation are drawn once and are those
of all evaluations of the step. x is the input, or its embedding (manifold mixup: Verma et al.; ICML
2019, arXiv 1806.05236; at the first layer alone).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from transformers import Trainer

from nso_hf.arguments import NSOConfig
from nso_hf.refusal import check_choice, check_positive, refusal
from nso_hf.trainer import NSOTrainerMixin

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

PLACES = ["inputs", "embeddings"]


@dataclass
class MixupArguments:
    """The options of mixup. Combine them with any training arguments, as `NSOArguments`.

    Raises:
        ValueError: an option is out of its range.
    """

    mixup_alpha: float = field(
        default=0.2,
        metadata={"help": "Mixtures are of lambda ~ Beta(alpha, alpha), alpha > 0."},
    )
    mixup_place: str = field(
        default="inputs",
        metadata={
            "help": "What is mixed: the 'inputs' (images), or their 'embeddings' (text).",
            "choices": PLACES,
        },
    )

    def __post_init__(self) -> None:
        check_positive("mixup_alpha", self.mixup_alpha, "Typical values are 0.1 to 0.4")
        check_choice("mixup_place", self.mixup_place, PLACES)
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()


class MixedLabels(NamedTuple):
    """The labels of mixtures: `share` of `first`, the rest of `second`, which is `first[order]`."""

    first: Tensor
    second: Tensor
    share: float
    order: Tensor


class MixupMixin(_Base):
    """Mixup for trainers of classifiers, one label an example:
    `class MyTrainer(NSOTrainerMixin, MixupMixin, Trainer)`.

    The options are read from `args` where that is a `MixupArguments`. The loss is the cross-entropy
    of the model's logits, smoothed by `label_smoothing_factor`; evaluation mixes nothing.

    Raises:
        ValueError: the batches have nothing to mix, or the trainer has a loss of its own.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base for base in cls.__mro__ if base in (NSOTrainerMixin, MixupMixin, Trainer)]
        if order not in ([NSOTrainerMixin, MixupMixin, Trainer], [MixupMixin, Trainer]):
            rule = "mixtures would be drawn in every evaluation of a step, or never"
            cure = "Write class MyTrainer(NSOTrainerMixin, MixupMixin, SomeTrainer)"
            raise refusal("bases", [base.__name__ for base in cls.__bases__], rule, cure)

    @property
    def compute_loss_func(self) -> Any:
        """The Trainer's door for a loss of one's own."""
        return self._mixed_loss

    @compute_loss_func.setter
    def compute_loss_func(self, given: Any) -> None:
        if given is not None:
            rule = "mixup's is the cross-entropy of two labels"
            name = getattr(given, "__name__", type(given).__name__)
            raise refusal("compute_loss_func", name, rule, "Leave it out")

    @property
    def _mixup(self) -> MixupArguments:
        return self.args if isinstance(self.args, MixupArguments) else MixupArguments()

    def _prepare_inputs(self, inputs: Any) -> Any:
        # NSO calls it once for all evaluations of a micro-batch.
        inputs = super()._prepare_inputs(inputs)
        model: Any = self.model
        return self._mixed(inputs) if model.training else inputs

    def _mixed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            rule = "must be one class for each example"
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else None
            raise refusal("labels", shape, rule, "Use mixup for classification alone")
        alpha, place = self._mixup.mixup_alpha, self._mixup.mixup_place
        share = Beta(alpha, alpha).sample().item()
        order = torch.randperm(len(labels)).to(labels.device)
        batch = dict(inputs)
        if place == "inputs":
            images = {name: x for name, x in batch.items() if _is_mixable(x, len(labels))}
            if not images:
                rule = f"none of {', '.join(batch)} is a floating-point input"
                raise refusal("mixup_place", place, rule, "Set mixup_place='embeddings'")
            batch |= {name: _mixture(x, share, order) for name, x in images.items()}
        elif "attention_mask" in batch:  # a mixture is as long as the longer of the two
            mask = batch["attention_mask"]
            batch["attention_mask"] = torch.maximum(mask, mask[order])
        return batch | {"labels": MixedLabels(labels, labels[order], share, order)}

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        if isinstance(labels, MixedLabels) and self._mixup.mixup_place == "embeddings":
            with _mixed_embeddings(self.accelerator.unwrap_model(model), labels):
                return super().compute_loss(model, inputs, *args, **kwargs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _mixed_loss(
        self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = (outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]).float()
        pairs = [(labels, 1.0)]
        if isinstance(labels, MixedLabels):
            pairs = [(labels.first, labels.share), (labels.second, 1 - labels.share)]
        options: Any = {"reduction": "sum", "label_smoothing": self.args.label_smoothing_factor}
        losses = [share * nn.functional.cross_entropy(logits, y, **options) for y, share in pairs]
        count = len(logits) if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = torch.stack(losses).sum() / count
        return loss


@dataclass
class MixupConfig(MixupArguments, NSOConfig):
    """`NSOConfig` with the options of mixup."""


class MixupTrainer(NSOTrainerMixin, MixupMixin, Trainer):
    """`NSOTrainer` with mixup. See `MixupMixin`."""


def _is_mixable(value: Any, examples: int) -> bool:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return is_real and value.dim() > 1 and len(value) == examples


def _mixture(x: Tensor, share: float, order: Tensor) -> Tensor:
    return share * x + (1 - share) * x[order]


@contextmanager
def _mixed_embeddings(model: nn.Module, labels: MixedLabels) -> Iterator[None]:
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        rule = f"{type(model).__name__} does not say which layer embeds its inputs"
        raise refusal("mixup_place", "embeddings", rule, "Set mixup_place='inputs'") from error
    hook = embeddings.register_forward_hook(
        lambda module, inputs, output: _mixture(output, labels.share, labels.order)
    )
    try:
        yield
    finally:
        hook.remove()

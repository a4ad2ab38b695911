"""The Trainer for models of open_clip: its loss is of the whole batch of an optimizer step."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from nso_hf.backends import select, shape_of
from nso_hf.curvature.batches import Batch
from nso_hf.refusal import refusal
from nso_hf.step.side_effects import Buffers, random_state_kept
from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.clip.encoding import Encoded, encode
from nso_hf.tasks.clip.logit_scale import groups_of_logit_scale, keep_logit_scale_in_bounds
from nso_hf.tasks.clip.loss import contrastive_loss, loss_of
from nso_hf.tasks.clip.models import ClipModel, is_coca
from nso_hf.tasks.clip.pairs import Pairs
from nso_hf.tasks.clip.retrieval import METRICS, retrieval
from nso_hf.tasks.clip.stream import PairStream
from nso_hf.tasks.epochs import TellEpoch
from nso_hf.trainer import NSOTrainer

logger = logging.get_logger(__name__)

_WITHOUT_DECAY = re.compile("bn|ln|bias|logit_scale")  # as open_clip, which adds all vectors
_FEATURES = ("image_features", "text_features")


class CLIPTrainer(NSOTrainer):
    """`NSOTrainer` for models of open_clip, whose `forward` has no loss of its own.

    In training the loss is that of the global batch of an optimizer step: the pairs of all
    processes and of all accumulated micro-batches are each other's negatives, at each evaluation
    point of the method. The features of the other micro-batches are computed once for each point,
    without gradient. Outside of training steps (curvature) it is the loss of the batch it is given.

    After each step `logit_scale` is put back into [0, ln 100]; it is logged as
    `clip/logit_scale`. Gains, biases and `logit_scale` have no weight decay.

    Evaluation gives the mean loss over batches of `per_device_eval_batch_size` pairs, and retrieval
    in both directions (see `retrieval`).

    Args:
        clip: the model and its transforms.
        args: the options.
        train_dataset: a `PairStream`, or anything with rows of `image` and `text` tensors.
        eval_dataset: `Pairs`.

    Raises:
        ValueError: as `NSOTrainer`; or `sign` gives different weights to processes whose features
            are compared.
    """

    def __init__(
        self,
        clip: ClipModel,
        args: CLIPConfig,
        train_dataset: Any = None,
        eval_dataset: Pairs | None = None,
        **kwargs: Any,
    ) -> None:
        self.clip = clip
        super().__init__(
            model=clip.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        if self.nso_args.sign == "alternate" and self.nso_backend.num_copies > 1:
            rule = "the features of processes at W + U and at W - U would be compared"
            raise refusal("sign", "alternate", rule, "Use sign='both', or shard the weights")
        parts = args.gradient_accumulation_steps * self.nso_backend.num_copies
        if self.nso_args.chosen_method().reads_gradients and parts > 1:
            rule = "all pairs of a step are compared: no micro-batch has a gradient of its own"
            cure = "Use gradient_accumulation_steps=1 and one copy of the weights, or method='nso'"
            raise refusal("method", self.nso_args.method, rule, cure)
        has_own_batches = train_dataset is not None and not isinstance(train_dataset, PairStream)
        if has_own_batches and not args.dataloader_drop_last:
            rule = "a smaller last batch, or one filled up with pairs it has, is another loss"
            raise refusal("dataloader_drop_last", False, rule, "Set it to true")
        self._check_options(args)
        if isinstance(train_dataset, PairStream):
            self.add_callback(TellEpoch(train_dataset))
        options: dict[str, Any] = {
            "caption_weight": args.coca_caption_weight,
            "contrastive_weight": args.coca_contrastive_weight,
        }
        self.loss_of_batch = contrastive_loss(clip.model, **options)
        self._loss_of_global_batch = contrastive_loss(
            clip.model,
            process=args.process_index,
            processes=args.world_size,
            local_loss=args.local_loss,
            **options,
        )
        self._logit_scale: Tensor | None = None
        self._nso_micro_batches: list[Any] = []
        self._nso_features: dict[Any, list[dict[str, Tensor]]] = {}

    def nso_first_batches(self, number: int) -> list[Batch]:
        """Of single processes: contrastive losses of more pairs are higher."""
        if not isinstance(self.train_dataset, PairStream):
            return super().nso_first_batches(number)
        size = self.train_dataset.batch_size
        pairs = iter(self.train_dataset.undealt())
        most = len(self.train_dataset.pairs) // size
        return [
            self.data_collator([next(pairs) for _ in range(size)]) for _ in range(min(number, most))
        ]

    def _check_options(self, args: CLIPConfig) -> None:
        best = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if args.eval_strategy != "no" and best not in (known := ["loss", *METRICS]):
            raise refusal("metric_for_best_model", best, "unknown", f"Use {', '.join(known)}")
        for option in ("coca_caption_weight", "coca_contrastive_weight"):
            is_default = getattr(args, option) == getattr(CLIPConfig, option)
            if not is_default and not is_coca(self.clip.model):
                rule = f"{type(self.clip.model).__name__} has no caption loss"
                raise refusal(option, getattr(args, option), rule, "Leave it out")

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        stream = self.train_dataset
        if not isinstance(stream, PairStream):
            return super().get_train_dataloader()
        stream.batch_size = self._train_batch_size
        workers = self.args.dataloader_num_workers
        return DataLoader(
            stream,
            batch_size=stream.batch_size,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Or it would draw from the global one, more often in a run that goes on.
            generator=torch.Generator(),
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        if isinstance(dataloader.dataset, PairStream):
            return len(dataloader.dataset) * int(self.args.world_size)
        number: int = super().num_examples(dataloader)
        return number

    # Loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not groups_of_logit_scale(self.optimizer):
            rule = "one that the Trainer does not make would not keep logit_scale in bounds"
            cure = "Leave it out of the back end's configuration, and set --optim"
            raise refusal("optimizer", type(self.optimizer).__name__, rule, cure)
        result = super().get_batch_samples(*args, **kwargs)
        self._nso_micro_batches, self._nso_features = result[0], {}
        if len(self._nso_micro_batches) < self.args.gradient_accumulation_steps:
            logger.warning_once(
                f"The last step of an epoch has {len(self._nso_micro_batches)} micro-batches, not "
                f"{self.args.gradient_accumulation_steps}: its pairs have fewer negatives. A "
                "PairStream with micro_batches set leaves them for another epoch."
            )
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        if self._nso_point is None:
            loss = loss_of(self.loss_of_batch, outputs)
        else:
            self._logit_scale = outputs["logit_scale"].detach()
            loss = loss_of(self._loss_of_global_batch, self._among_micro_batches(outputs))
        return (loss, outputs) if return_outputs else loss

    def _among_micro_batches(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for this micro-batch, with the features of all of the step's, in order.

        The gradient of the step is the sum over micro-batches of the gradients through the features
        of each, where the Trainer takes their mean.
        """
        mine, number = self._nso_micro_batch - 1, len(self._nso_micro_batches)
        if number == 1:
            return dict(outputs)
        features = self._features_at_this_point(outputs, mine)
        together = dict(outputs)
        for name in _FEATURES:
            own = outputs[name]
            if own.requires_grad:
                own.register_hook(lambda gradient: gradient * number)
            parts = [f[name] for f in features[:mine]] + [own]
            together[name] = torch.cat(parts + [f[name] for f in features[mine + 1 :]])
        return together

    def _features_at_this_point(
        self, outputs: Mapping[str, Tensor], mine: int
    ) -> Sequence[Mapping[str, Tensor]]:
        assert self._nso_point is not None
        point = (self._nso_point.displacement, self._nso_point.sign)
        if point not in self._nso_features:
            number, module = len(self._nso_micro_batches), self.nso_backend.module
            encoded = {mine: {name: outputs[name].detach() for name in _FEATURES}}
            # Random numbers go on where those of this micro-batch end, as they will when the
            # following ones have their turn: with common random numbers, the same dropout masks.
            with (
                torch.no_grad(),
                random_state_kept({self.args.device}),
                Buffers(module).kept(),
            ):
                for other in [*range(mine + 1, number), *range(mine)]:
                    found = module(**self._prepare_inputs(self._nso_micro_batches[other]))
                    encoded[other] = {name: found[name] for name in _FEATURES}
            self._nso_features[point] = [encoded[m] for m in range(number)]
        return self._nso_features[point]

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if len(shape_of(parameter)) >= 2 and not _WITHOUT_DECAY.search(name)
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer: Optimizer = super().create_optimizer(*([] if model is None else [model]))
        keep_logit_scale_in_bounds(optimizer, self.clip.model if model is None else model)
        return optimizer

    # Logs, evaluation, files

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._logit_scale is not None:
            logs["clip/logit_scale"] = self._logit_scale.item()
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        pairs = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(pairs, Pairs):
            raise refusal("eval_dataset", type(pairs).__name__, "must be Pairs", "Use open_pairs")
        return pairs

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        encoded = self.encode(dataloader)
        metrics = {"loss": encoded.loss} | retrieval(encoded, self.args.device).metrics
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, len(encoded))  # type: ignore[arg-type]

    def encode(self, pairs: Pairs, needs: str = "caption") -> Encoded:
        """Features of pairs and their loss; of images alone where what they need is a "label"."""
        return encode(
            self.module,
            self.clip,
            pairs,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            workers=self.args.dataloader_num_workers,
            loss=self.loss_of_batch if needs == "caption" else None,
            needs=needs,
        )

    @property
    def module(self) -> nn.Module:
        """What to call to encode, whichever way the weights are held."""
        wrapped = self.model_wrapped if self.model_wrapped is not None else self.model
        assert wrapped is not None
        return select(self.accelerator, wrapped).module

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.clip.write_config(Path(output_dir or str(self.args.output_dir)))

"""The options of CLIP pretraining: those of NSO and of training, with other defaults."""

from dataclasses import dataclass, field

from nso_hf.arguments import NSOConfig

_LOGIT = r"\blogit_(scale|bias)$"


@dataclass
class CLIPConfig(NSOConfig):
    """`NSOConfig` with the defaults of CLIP pretraining (arXiv 2306.08553, 2103.00020)."""

    _argument_group_name = "training"

    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(
        default=0.1, metadata={"help": "Of matrices; gains, biases and logit_scale have none."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "After the warm-up."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs of one process in a forward pass."}
    )
    per_device_eval_batch_size: int = field(
        default=128,
        metadata={"help": "Pairs the validation loss is taken over, and encoded at a time."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Set it where parts of the model get no gradient."}
    )
    local_loss: bool = field(
        default=True,
        metadata={
            "help": "Each process computes its own rows of the logits of the global batch; if "
            "false, all of them. The gradient is the same."
        },
    )
    perturb_logit_scale: bool = field(
        default=False, metadata={"help": "Perturb logit_scale and logit_bias too."}
    )
    coca_caption_weight: float = field(
        default=2.0, metadata={"help": "Weight of CoCa's caption loss."}
    )
    coca_contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of CoCa's contrastive loss."}
    )

    def __post_init__(self) -> None:
        excluded = list(self.perturb_exclude or [])
        if not self.perturb_logit_scale and _LOGIT not in excluded:
            self.perturb_exclude = [*excluded, _LOGIT]
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("_rank"):
            self.greater_is_better = False
        super().__post_init__()

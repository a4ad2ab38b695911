"""The options of pretraining masked autoencoders: those of NSO and of training, and of the
regularization by the task to come."""

from dataclasses import dataclass, field

from nso_hf.arguments import NSOConfig
from nso_hf.refusal import check_integer, check_positive, check_range


@dataclass
class MAEConfig(NSOConfig):
    """`NSOConfig` with the defaults of masked autoencoders (arXiv 2111.06377), and the
    regularization of representations (arXiv 2403.06871)."""

    _argument_group_name = "training"

    rademacher_strength: float = field(
        default=0.0,
        metadata={
            "help": "lambda of the regularization lambda R E_s || mean_i s_i h(x_i) || of the "
            "representations of images of the task to come; 0: none."
        },
    )
    rademacher_radius: float = field(
        default=1.0, metadata={"help": "R, the largest norm of the linear heads on them."}
    )
    rademacher_draws: int = field(
        default=8, metadata={"help": "Draws of the signs s in each micro-batch."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Of all weights but gains and biases."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "After the warm-up."})
    per_device_train_batch_size: int = field(
        default=128,
        metadata={
            "help": "Images of one process in a forward pass; with --rademacher_strength as many "
            "of the task to come beside them."
        },
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images encoded at a time."}
    )

    def __post_init__(self) -> None:
        hint = "Typical values are 0.001 to 0.1; 0 leaves it out"
        check_range("rademacher_strength", self.rademacher_strength, 0.0, float("inf"), hint)
        check_positive("rademacher_radius", self.rademacher_radius, "Leave it at 1")
        check_integer("rademacher_draws", self.rademacher_draws, 1, "Typical values are 4 to 32")
        super().__post_init__()

"""Companions as options of a recipe."""

from dataclasses import dataclass, field

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from nso_hf.companions.averaging import EMACallback, SWACallback
from nso_hf.companions.distance import DistancePenalty
from nso_hf.refusal import check_integer, check_positive, check_range, refusal


@dataclass
class CompanionOptions:
    _argument_group_name = "companions"

    ema_decay: float | None = field(
        default=None,
        metadata={"help": "End with the exponential moving average of the weights. Typical: 0.99."},
    )
    swa_start: float | None = field(
        default=None,
        metadata={
            "help": "End with the mean of the weights after each step from this share of training "
            "on (SWA, arXiv 1803.05407). Typical: 0.67."
        },
    )
    l2_sp: float | None = field(
        default=None,
        metadata={
            "help": "Strength of a penalty on the distance from where training began: "
            "l2_sp/2 ||W - W_0||^2 (L2-SP, arXiv 1802.01483). Typical: 0.01."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when so many evaluations after one another were no better than the best. "
            "Needs --load_best_model_at_end."
        },
    )

    def __post_init__(self) -> None:
        if self.ema_decay is not None:
            check_range("ema_decay", self.ema_decay, 0, 1, "Typical values are 0.99 to 0.9999")
        if self.swa_start is not None:
            check_range("swa_start", self.swa_start, 0, 1, "0.67 averages over the last third")
            if self.swa_start == 1:
                rule, cure = "nothing would be averaged", "0.67 averages over the last third"
                raise refusal("swa_start", self.swa_start, rule, cure)
        if self.l2_sp is not None:
            check_positive("l2_sp", self.l2_sp, "Typical: 0.01")
        if self.early_stopping_patience is not None:
            cure = "1 stops at the first evaluation that is no better"
            check_integer("early_stopping_patience", self.early_stopping_patience, 1, cure)
        if self.ema_decay is not None and self.swa_start is not None:
            rule = "training ends with one average, and ema_decay asks for another"
            raise refusal("swa_start", self.swa_start, rule, "Leave one of them out")

    def check(self, args: TrainingArguments) -> None:
        """
        Raises:
            ValueError: the options of training do not go with these.
        """
        for option in ("ema_decay", "swa_start"):
            value = getattr(self, option)
            if value is not None and args.load_best_model_at_end:
                rule = "--load_best_model_at_end puts another model there when training ends"
                raise refusal(option, value, rule, "Leave one of them out")
        patience = self.early_stopping_patience
        if patience is not None and not args.load_best_model_at_end:
            cure = "Pass --load_best_model_at_end true, with --metric_for_best_model"
            raise refusal("early_stopping_patience", patience, "there is no best model", cure)

    @property
    def apply_average(self) -> bool:
        """Whether training ends with an average, of weights that were never evaluated."""
        return self.ema_decay is not None or self.swa_start is not None

    def callbacks(self, *, update_bn: bool = True) -> list[TrainerCallback]:
        """What does it during training. `update_bn`: see `AveragingCallback`."""
        made: list[TrainerCallback] = []
        if self.ema_decay is not None:
            made.append(EMACallback(self.ema_decay, apply_at_end=True, update_bn=update_bn))
        if self.swa_start is not None:
            made.append(SWACallback(start=self.swa_start, apply_at_end=True, update_bn=update_bn))
        if self.l2_sp is not None:
            made.append(DistancePenalty(self.l2_sp))
        if self.early_stopping_patience is not None:
            made.append(EarlyStoppingCallback(self.early_stopping_patience))
        return made

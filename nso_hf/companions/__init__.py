"""What goes along with any method: averages of the weights, the distance to the first ones, mixup,
wrong labels."""

from nso_hf.companions.averaging import AveragingCallback, EMACallback, SWACallback
from nso_hf.companions.distance import DistancePenalty, DistanceProjection
from nso_hf.companions.label_noise import NoisyLabels, with_label_noise
from nso_hf.companions.mixup import MixupArguments, MixupConfig, MixupMixin, MixupTrainer

__all__ = [
    "AveragingCallback",
    "DistancePenalty",
    "DistanceProjection",
    "EMACallback",
    "MixupArguments",
    "MixupConfig",
    "MixupMixin",
    "MixupTrainer",
    "NoisyLabels",
    "SWACallback",
    "with_label_noise",
]

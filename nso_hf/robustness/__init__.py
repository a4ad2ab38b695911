"""What of a trained model survives changes to its weights."""

from nso_hf.robustness.measuring import Row, robustness
from nso_hf.robustness.merging import average, task_arithmetic
from nso_hf.robustness.noise import weight_noise
from nso_hf.robustness.pruning import pruned
from nso_hf.robustness.quantisation import round_to_nearest

__all__ = [
    "Row",
    "average",
    "pruned",
    "robustness",
    "round_to_nearest",
    "task_arithmetic",
    "weight_noise",
]

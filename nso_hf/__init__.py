"""Noise Stability Optimization (arXiv 2306.08553) as a drop-in for the Hugging Face Trainer."""

from nso_hf.arguments import NSOArguments, NSOConfig, NSOSeq2SeqConfig
from nso_hf.trainer import NSOSeq2SeqTrainer, NSOTrainer, NSOTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "NSOArguments",
    "NSOConfig",
    "NSOSeq2SeqConfig",
    "NSOSeq2SeqTrainer",
    "NSOTrainer",
    "NSOTrainerMixin",
    "__version__",
]

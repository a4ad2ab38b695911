"""Noise Stability Optimization (arXiv 2306.08553) as a drop-in for the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nso_hf import moved

if TYPE_CHECKING:
    from nso_hf.arguments import NSOArguments, NSOConfig, NSOSeq2SeqConfig
    from nso_hf.trainer import NSOSeq2SeqTrainer, NSOTrainer, NSOTrainerMixin

__version__ = "0.2.0.dev0"

__all__ = [
    "NSOArguments",
    "NSOConfig",
    "NSOSeq2SeqConfig",
    "NSOSeq2SeqTrainer",
    "NSOTrainer",
    "NSOTrainerMixin",
    "__version__",
]

moved.install()


def __getattr__(name: str) -> Any:
    # When asked for, since PyTorch and Transformers take seconds that `nso --help` need not.
    if name not in __all__:
        raise AttributeError(f"module 'nso_hf' has no attribute {name!r}")
    module = "nso_hf.trainer" if "Trainer" in name else "nso_hf.arguments"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

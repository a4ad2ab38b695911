"""Where the weights live and how gradients are reduced: the only place that knows how a run is
distributed."""

from nso_hf.backends.base import HOOKS, Backend, Weight
from nso_hf.backends.deepspeed import shape_of
from nso_hf.backends.errors import without_moments
from nso_hf.backends.selection import OPTIONS, alone, check, select

__all__ = [
    "HOOKS",
    "OPTIONS",
    "Backend",
    "Weight",
    "alone",
    "check",
    "select",
    "shape_of",
    "without_moments",
]

"""Deep LoRA (Yaras, Wang, Balzano, Qu; ICML 2024, arXiv 2406.04112): low-rank adapters of three or
more factors."""

from nso_hf.deep_lora.making import deepen
from nso_hf.deep_lora.saving import load_deep_lora

__all__ = ["deepen", "load_deep_lora"]

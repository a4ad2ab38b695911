"""What of a trained model survives changes to its weights."""

from nso_hf.robustness.quantisation import round_to_nearest

__all__ = ["round_to_nearest"]

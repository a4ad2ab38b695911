"""Curvature of the loss: what Noise Stability Optimization claims to reduce.

Every measurement takes a model and batches, or a Trainer, whose processes then measure together; it
leaves weights, gradients, modes and random state as it found them.
"""

from nso_hf.curvature.batches import training_batches
from nso_hf.curvature.bound import PacBayesBound, pac_bayes_bound
from nso_hf.curvature.callback import CurvatureCallback
from nso_hf.curvature.eigenvalues import Eigenvalues, hessian_eigenvalues
from nso_hf.curvature.sigma import SigmaFound, find_sigma
from nso_hf.curvature.slices import LossSlice, loss_slice
from nso_hf.curvature.spectrum import Spectrum, hessian_spectrum
from nso_hf.curvature.stability import NoiseStability, noise_stability
from nso_hf.curvature.trace import Estimate, Trace, hessian_trace

__all__ = [
    "CurvatureCallback",
    "Eigenvalues",
    "Estimate",
    "LossSlice",
    "NoiseStability",
    "PacBayesBound",
    "SigmaFound",
    "Spectrum",
    "Trace",
    "find_sigma",
    "hessian_eigenvalues",
    "hessian_spectrum",
    "hessian_trace",
    "loss_slice",
    "noise_stability",
    "pac_bayes_bound",
    "training_batches",
]

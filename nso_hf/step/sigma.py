"""What sigma is measured in, and what it is found by."""

import math

from nso_hf.refusal import check_range

AUTO = "auto"
"""For sigma: found by its effect."""

SCALES = ("absolute", "relative")
"""The units of sigma: those of the weights, or the root mean square of each row."""

RISE = 0.005
"""The rise of the loss, as a share of it, that sigma is found by where nobody says another."""

_LEAST_RISE = 1e-5  # that float32 can tell


def check_rise(option: str, rise: float) -> None:
    """
    Raises:
        ValueError: it is no share of a loss that can be told from rounding.
    """
    check_range(option, rise, _LEAST_RISE, math.inf, "0.005 is a rise by a 200th of the loss")

import math

import pytest

from nso_hf.running.figures import with_error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (474.8, 254, "470 ± 250"),
        (474.8, 2.5, "474.8 ± 2.5"),
        (-145.2, 39.7, "-145 ± 40"),
        (0.031234, 0.0014, "0.0312 ± 0.0014"),
        (89.62, 0.0996, "89.62 ± 0.10"),  # 0.0996 has the two digits 0.10
        (1.23e-7, 4.5e-9, "(1.230 ± 0.045)e-07"),
        (4.748e9, 2.54e8, "(4.75 ± 0.25)e+09"),
        (3.0, 25_000, "0 ± 25000"),
        (-0.001, 0.25, "0.00 ± 0.25"),
        (0.0, 0.25, "0.00 ± 0.25"),
        (12.3456, 0.0, "12.35 ± 0"),
        (12.3456, math.nan, "12.35 ± nan"),
        (math.inf, 1.0, "inf ± 1"),
    ],
)
def test_value_and_error_end_at_the_same_digit(value, error, text):
    assert with_error(value, error) == text

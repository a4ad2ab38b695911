"""Numbers as people read them."""

import math
from collections.abc import Iterator, Mapping, Sequence


def with_error(value: float, error: float) -> str:
    """`value ± error`, both in one format and down to the second significant digit of the error:
    "470 ± 250", "0.0312 ± 0.0014", "(1.230 ± 0.045)e-07"."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.4g} ± {error:.2g}"
    last = _power(error) - 1
    size = max(_power(error), _power(value) if value else -math.inf)
    shared = 0 if -4 < size < 6 else int(size)
    # + 0.0, since what is rounded to nothing should not be minus nothing
    parts = (round(x, -last) / 10.0**shared + 0.0 for x in (value, error))
    text = " ± ".join(f"{part:.{max(0, shared - last)}f}" for part in parts)
    return f"({text})e{shared:+03d}" if shared else text


_CURVATURE = {
    "trace of the Hessian": ("trace", "trace_stderr"),
    "largest eigenvalue": ("lambda_max", "lambda_max_residual"),
}


def curvature_rows(
    measured: Sequence[Mapping[str, float] | None],
) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table that has a column for each of these measurements, or none."""
    if any(measured):
        for title, (value, error) in _CURVATURE.items():
            yield title, [with_error(m[value], m[error]) if m else "" for m in measured]


def _power(number: float) -> int:
    """The power of ten of its first digit, once rounded to two."""
    return int(f"{number:.1e}".partition("e")[2])

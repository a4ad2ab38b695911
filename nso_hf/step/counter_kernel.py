"""The kernel of `nso_hf.step.counter`, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _normal_pair(a, b):
    # Box and Muller, from uniforms in (0, 1].
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float32) + 0.5) * 2.3283064365386963e-10))
    angle = (b.to(tl.float32) + 0.5) * (6.283185307179586 * 2.3283064365386963e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _uniform(a):
    return (a.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * (1.7320508075688772 / 2147483648.0)


@triton.jit
def _laplace(a):
    # A sign and the logarithm of a uniform in (0, 1].
    size = tl.log(((a & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10)
    return tl.where(a >> 31 == 1, size, -size) * 0.7071067811865476


@triton.jit
def _rademacher(a):
    return tl.where(a >> 31 == 1, 1.0, -1.0)


@triton.jit
def _draw(a, b, c, d, DISTRIBUTION: tl.constexpr):
    if DISTRIBUTION == "normal":
        a, b = _normal_pair(a, b)
        c, d = _normal_pair(c, d)
    elif DISTRIBUTION == "uniform":
        a, b, c, d = _uniform(a), _uniform(b), _uniform(c), _uniform(d)
    elif DISTRIBUTION == "laplace":
        a, b, c, d = _laplace(a), _laplace(b), _laplace(c), _laplace(d)
    else:
        a, b, c, d = _rademacher(a), _rademacher(b), _rademacher(c), _rademacher(d)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit(do_not_specialize=["key_low", "key_high", "std"])
def _add(
    table,
    owners,
    rows,
    key_low,
    key_high,
    std,
    DISTRIBUTION: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    part = table + tl.load(owners + chunk) * 8
    start, size = tl.load(part + 1), tl.load(part + 2)
    first = start // 4 * 4 + (chunk - tl.load(part + 4)) * CHUNK  # position in the whole weight
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    key = high.to(tl.uint64) << 32 | low.to(tl.uint64)
    four = first // 4 + tl.arange(0, CHUNK // 4)
    index = tl.load(part + 3).to(tl.uint32)
    counter = four.to(tl.uint32)
    a, b, c, d = tl.philox(
        key, counter, (four >> 32).to(tl.uint32), index + counter * 0, counter * 0
    )
    u = _draw(a, b, c, d, DISTRIBUTION)
    position = first + tl.arange(0, CHUNK)
    if HAS_ROWS:
        length, first_row, num_rows = tl.load(part + 5), tl.load(part + 6), tl.load(part + 7)
        u *= tl.load(rows + first_row + position // length % num_rows)
    local = position - start
    held = (local >= 0) & (local < size)
    data = tl.load(part).to(tl.pointer_type(DTYPE)) + local
    value = tl.load(data, mask=held)
    if tl.float64 == DTYPE:
        moved = value + (std * u).to(tl.float64)
    else:
        moved = value.to(tl.float32) + std * u
    tl.store(data, moved.to(DTYPE), mask=held)


def launch(
    table: Tensor,
    owners: Tensor,
    rows: Tensor | None,
    key: tuple[int, int],
    std: float,
    distribution: str,
    dtype: torch.dtype,
    chunk: int,
) -> None:
    """Add the noise to the parts that `table` lists."""
    has_rows = rows is not None
    _add[(len(owners),)](
        table,
        owners,
        rows if has_rows else table,
        *key,
        std,
        DISTRIBUTION=distribution,
        DTYPE=DTYPES[dtype],
        HAS_ROWS=has_rows,
        CHUNK=chunk,
    )

"""Noise U as a pure function of (seed, step, draw, weight, position): no state to save, the same on
every replica.

On GPUs it is that of `nso_hf.step.counter`. Elsewhere a weight of n elements is cut into blocks of
`BLOCK` elements, counted from the start of the whole (unsharded) tensor. Each block has a
generator of its own, so that any part of the noise can be drawn anywhere, in any order and in
parallel, and the global random state is never touched.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from nso_hf.backends import Weight
from nso_hf.step import counter

BLOCK = 2**17
"""Elements drawn from one generator: so many that threads seldom wait for the interpreter."""


def _normal(u: Tensor, generator: Generator) -> Tensor:
    return u.normal_(generator=generator)


def _uniform(u: Tensor, generator: Generator) -> Tensor:
    return u.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)


def _laplace(u: Tensor, generator: Generator) -> Tensor:
    # The difference of two exponentials of rate sqrt(2): variance 1/2 + 1/2.
    rate = math.sqrt(2)
    return u.exponential_(rate, generator=generator) - torch.empty_like(u).exponential_(
        rate, generator=generator
    )


def _rademacher(u: Tensor, generator: Generator) -> Tensor:
    # Each bit of random integers becomes the sign of a 1.0: a tenth of the time of `bernoulli_`.
    words = torch.empty(math.ceil(u.numel() / 32), 1, dtype=torch.int32, device=u.device)
    words.random_(-(2**31), 2**31, generator=generator)
    places = torch.arange(32, dtype=torch.int32, device=u.device)
    ones = (words << places).bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)
    return ones.view(torch.float32).flatten()[: u.numel()]


DISTRIBUTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "laplace": _laplace,
    "rademacher": _rademacher,
}
"""Name -> sampler that fills a float32 tensor with independent draws of mean 0 and variance 1,
symmetric about 0."""


def block_seed(seed: int, step: int, draw: int, weight: int, block: int) -> int:
    """A 63-bit seed hashed from the block's coordinates.

    The CPU generator keeps 32 bits of it, so that two blocks in 4e9 share their noise: too few to
    move any expectation.
    """
    digest = hashlib.blake2b(
        struct.pack("<5q", seed, step, draw, weight, block), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Noise:
    """The displacement U, E[U U'] = std^2 I, of draw `draw` of optimizer step `step`."""

    seed: int
    step: int
    draw: int
    std: float
    distribution: str = "normal"

    def add_to(self, weights: Sequence[Weight]) -> None:
        """Add to each local weight its part of U, in place."""
        # `reshape` is a view of a contiguous weight, a copy of a transposed or channels-last one.
        flats = [weight.data.reshape(-1) for weight in weights]
        parts, blocks = [], []
        for flat, weight in zip(flats, weights, strict=True):
            if counter.serves(flat.device.type):
                factors = self.factors(weight) or ()
                parts.append(counter.Part(flat, weight.start, weight.index, *factors))
            else:
                blocks += [(flat, weight, block) for block in _blocks_of(weight)]
        if parts:
            counter.add(parts, self.seed, self.step, self.draw, self.std, self.distribution)
        on_cpu = all(flat.device.type == "cpu" for flat, *_ in blocks)
        # Random signs are drawn in less time than threads take to hand over the interpreter.
        in_parallel = on_cpu and self.distribution != "rademacher"
        self._add_in_parallel(blocks, workers=torch.get_num_threads() if in_parallel else 1)
        for flat, weight in zip(flats, weights, strict=True):
            if not weight.data.is_contiguous():
                weight.data.copy_(flat.view(weight.data.shape))

    def _add_in_parallel(self, blocks: "list[tuple[Tensor, Weight, int]]", workers: int) -> None:
        if workers == 1 or len(blocks) < 2 * workers:
            return self._add_blocks(blocks)
        share = math.ceil(len(blocks) / (4 * workers))
        futures: list[Future[None]] = []
        try:
            for first in range(0, len(blocks), share):
                futures.append(
                    _pool(workers).submit(self._add_blocks, blocks[first : first + share])
                )
            for future in futures:
                future.result()
        finally:  # an interrupt must not leave a thread writing to weights that are being restored
            for future in futures:
                future.cancel()
            wait(futures)

    def _add_blocks(self, blocks: "list[tuple[Tensor, Weight, int]]") -> None:
        for flat, weight, block in blocks:
            self._add_block(flat, weight, block)

    def _add_block(self, flat: Tensor, weight: Weight, block: int) -> None:
        origin = block * BLOCK
        noise = self.block(weight, block)
        first = max(origin, weight.start)  # positions in the whole tensor
        end = min(origin + noise.numel(), weight.start + flat.numel())
        part = self.scaled(noise[first - origin : end - origin], weight, first)
        flat[first - weight.start : end - weight.start].add_(part, alpha=self.std)

    def factors(self, weight: Weight) -> tuple[Tensor, int] | None:
        """What U/std is multiplied by, and how many elements in a row share one of these; after the
        last it begins again with the first."""
        return None

    def scaled(self, noise: Tensor, weight: Weight, first: int) -> Tensor:
        """A part of U/std, from position `first` of the whole `weight` on, as it is added."""
        return noise

    def block(self, weight: Weight, block: int) -> Tensor:
        """One whole block of U/std in float32, wherever the shard begins: the last block of a
        weight ends with it."""
        generator = Generator(weight.data.device).manual_seed(
            block_seed(self.seed, self.step, self.draw, weight.index, block)
        )
        empty = torch.empty(
            min(BLOCK, weight.numel - block * BLOCK), dtype=torch.float32, device=weight.data.device
        )
        return DISTRIBUTIONS[self.distribution](empty, generator)


def _blocks_of(weight: Weight) -> range:
    """The blocks of the whole tensor that overlap the local part of `weight`."""
    stop = weight.start + weight.data.numel()
    return range(weight.start // BLOCK, math.ceil(stop / BLOCK) if weight.data.numel() else 0)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nso-noise")

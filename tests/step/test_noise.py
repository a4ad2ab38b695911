"""Noise: right moments, a pure function of its coordinates, the global random state untouched."""

import hashlib
import struct
import subprocess
import sys

import pytest
import torch

from nso_hf.backends import Weight
from nso_hf.step import counter
from nso_hf.step.noise import BLOCK, DISTRIBUTIONS, Noise
from tests.reference import DEVICE

in_blocks = pytest.mark.skipif(counter.serves(DEVICE.type), reason="Triton draws here")


def weight(numel, index=0, start=0, local=None, dtype=torch.float32):
    data = torch.zeros(numel if local is None else local, dtype=dtype, device=DEVICE)
    return Weight("w", index, torch.nn.Parameter(data), data, start, torch.Size([numel]))


@pytest.mark.parametrize(
    ("distribution", "kurtosis", "sixth"),
    [("normal", 3, 15), ("uniform", 1.8, 27 / 7), ("laplace", 6, 90), ("rademacher", 1, 1)],
)
def test_moments(distribution, kurtosis, sixth):
    n = 5 * BLOCK
    w = weight(n)
    Noise(0, 0, 0, 2.0, distribution).add_to([w])
    u = w.data.double() / 2
    # Standard errors of sample moments over n independent draws.
    assert abs(u.mean()) < 4 / n**0.5
    assert abs(u.square().mean() - 1) < 4 * ((kurtosis - 1) / n) ** 0.5 + 1e-6
    assert abs(u.pow(3).mean()) < 4 * (sixth / n) ** 0.5
    halves = u.view(2, -1)
    assert abs((halves[0] * halves[1]).mean()) < 4 / (n / 2) ** 0.5
    assert abs((u[1:] * u[:-1]).mean()) < 4 / n**0.5


@in_blocks
def test_noise_is_the_hash_seeded_generator_of_each_block():
    # Derived again here from the documented coordinates.
    w = weight(BLOCK + 100, index=7)
    Noise(3, 5, 2, 0.5).add_to([w])
    for block, size in [(0, BLOCK), (1, 100)]:
        digest = hashlib.blake2b(struct.pack("<5q", 3, 5, 2, 7, block), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        expected = 0.5 * torch.randn(size, generator=generator)
        torch.testing.assert_close(w.data[block * BLOCK :][:size], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shards_of_any_size_hold_the_same_noise(distribution):
    n = BLOCK + 1234
    noise = Noise(0, 1, 0, 1.0, distribution)
    whole = weight(n)
    noise.add_to([whole])
    for world in (2, 3, 7):
        size = -(-n // world)
        shards = [
            weight(n, start=min(r * size, n), local=max(0, min(size, n - r * size)))
            for r in range(world)
        ]
        for shard in shards:
            noise.add_to([shard])
        assert torch.equal(torch.cat([shard.data for shard in shards]), whole.data)


def test_every_coordinate_changes_the_noise():
    def draw(seed=0, step=0, number=0, index=0):
        w = weight(1000, index=index)
        Noise(seed, step, number, 1.0).add_to([w])
        return w.data

    draws = [draw(), draw(seed=1), draw(step=1), draw(number=1), draw(index=1)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(5, device=DEVICE)
    assert correlations.abs().max() < 4 / 1000**0.5
    assert torch.equal(draw(), draw())


@in_blocks
def test_in_parallel_and_one_by_one_are_the_same():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            weights = [
                weight(n, index) for index, n in enumerate([3 * BLOCK, 5, 4 * BLOCK + 1, 0, 1])
            ]
            Noise(0, 0, 0, 1.0).add_to(weights)
            results.append(torch.cat([w.data for w in weights]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_layout_and_dtype_of_the_weight_do_not_matter():
    noise = Noise(0, 0, 0, 0.1)
    expected = weight(40 * 60)
    noise.add_to([expected])
    transposed = torch.zeros(60, 40, device=DEVICE).t()
    noise.add_to([Weight("w", 0, torch.nn.Parameter(transposed), transposed, 0, transposed.shape)])
    assert torch.equal(transposed, expected.data.view(40, 60))
    half = weight(2400, dtype=torch.bfloat16)
    noise.add_to([half])
    error = 2**-7 if counter.serves("cpu") else 0  # the interpreter cuts off, nothing else does
    torch.testing.assert_close(half.data, expected.data.bfloat16(), rtol=error, atol=0)


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    Noise(0, 0, 0, 1.0).add_to([weight(BLOCK)])
    assert torch.equal(torch.get_rng_state(), before)


@in_blocks
def test_blocks_need_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from nso_hf.backends import Weight; from nso_hf.step.noise import Noise\n"
        "data = torch.zeros(9)\n"
        "weight = Weight('w', 0, torch.nn.Parameter(data), data, 0, data.shape)\n"
        "Noise(0, 0, 0, 1.0).add_to([weight]); assert data.std() > 0.1"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@in_blocks
def test_an_interrupt_waits_for_the_threads(monkeypatch):
    # If it did not, a thread would go on adding noise to weights that are being restored.
    from nso_hf.step import noise as module

    running = []
    original = Noise._add_blocks

    def slow(self, blocks):
        if running:
            raise KeyboardInterrupt
        running.append(True)
        original(self, blocks)
        running.append("done")

    monkeypatch.setattr(Noise, "_add_blocks", slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        Noise(0, 0, 0, 1.0).add_to([weight(16 * BLOCK)])
    assert running == [True, "done"]
    assert module._pool(2)._work_queue.empty()

"""Noise as a counter, where Triton draws it: against Philox in NumPy, in any shard, and in no more
than one launch."""

import hashlib
import math
import os
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.step_cost import MODELS
from nso_hf.backends import Weight
from nso_hf.step import counter
from nso_hf.step.noise import DISTRIBUTIONS, Noise
from nso_hf.step.rows import RowFactors, RowNoise
from tests.reference import DEVICE

here = pytest.mark.skipif(not counter.serves(DEVICE.type), reason="Triton does not draw here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.skipif(counter.serves(DEVICE.type), reason="this is what it starts")
def test_the_kernel_is_interpreted():
    """All tests of noise once more, in a process in which Triton interprets."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    done = subprocess.run(
        [*command, folder / "test_counter.py", folder / "test_noise.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 20


def philox(key, counters):
    """Ten rounds of Philox 4x32 (Salmon et al. 2011): counters of shape (n, 4) -> words (n, 4)."""
    c = counters.astype(np.uint64)
    k = [np.uint64(part) for part in key]
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        high = [second >> np.uint64(32), first >> np.uint64(32)]
        c = np.stack(
            [high[0] ^ c[:, 1] ^ k[0], second & mask, high[1] ^ c[:, 3] ^ k[1], first & mask],
            axis=1,
        )
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c.astype(np.uint32)


def expected(seed, step, draw, index, first, n, distribution):
    """u at positions `first` to `first + n`, in float64."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, step, draw), digest_size=8).digest()
    fours = np.arange(first // 4, (first + n) // 4 + 1, dtype=np.uint64)
    counters = np.zeros((len(fours), 4), dtype=np.uint64)
    counters[:, 0], counters[:, 1] = fours & np.uint64(0xFFFFFFFF), fours >> np.uint64(32)
    counters[:, 2] = index
    words = philox(struct.unpack("<2I", digest), counters)
    x = (words.astype(np.float64) + 0.5) / 2**32
    signs = np.where(words >> 31 == 1, 1.0, -1.0)
    if distribution == "normal":
        radius, angle = np.sqrt(-2 * np.log(x[:, ::2])), 2 * math.pi * x[:, 1::2]
        u = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    elif distribution == "uniform":
        u = (words.view(np.int32) + 0.5) / 2**31 * math.sqrt(3)
    elif distribution == "laplace":
        u = signs * np.log(((words & 0x7FFFFFFF) + 0.5) / 2**31) / math.sqrt(2)
    else:
        u = signs
    return torch.from_numpy(u.reshape(-1)[first % 4 :][:n].copy())


def weight(numel, index=0, start=0, local=None, dtype=torch.float32):
    data = torch.zeros(numel if local is None else local, dtype=dtype, device=DEVICE)
    return Weight("w", index, torch.nn.Parameter(data), data, start, torch.Size([numel]))


@here
def test_philox_of_the_test_is_that_of_its_authors():
    """The vectors of Random123."""
    zeros = philox((0, 0), np.zeros((1, 4)))
    assert [hex(word) for word in zeros[0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    ones = philox((2**32 - 1, 2**32 - 1), np.full((1, 4), 2**32 - 1))
    assert [hex(word) for word in ones[0]] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


@here
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("first", [0, 4095, 2**33 + 5])
def test_noise_is_philox_of_the_position(distribution, first):
    n = 5000
    w = weight(first + n, 7, first, n) if first else weight(n, 7)
    Noise(3, 5, 2, 0.5, distribution).add_to([w])
    u = 0.5 * expected(3, 5, 2, 7, first, n, distribution)
    # Values of at most 11 from logarithms, roots and sines that are good to a few ulp of float32,
    # angles of at most 2 pi to half an ulp (2.4e-7).
    torch.testing.assert_close(w.data.cpu().double(), u, rtol=2e-6, atol=2e-6)


@here
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_added_in_float32_and_rounded_once(dtype):
    start = torch.randn(3000, device=DEVICE).to(dtype)
    u, w = weight(3000), weight(3000, dtype=dtype)
    w.data.copy_(start)
    for each in (u, w):
        Noise(0, 0, 0, 0.1).add_to([each])
    exact = start.double() + u.data.double()
    if dtype == torch.float64:
        assert torch.equal(w.data, exact)
    else:
        # Half an ulp; Triton's interpreter cuts bf16 off where a GPU rounds it. And u itself was
        # rounded, which in a multiply-add the product is not.
        ulps = 1 if dtype == torch.bfloat16 and counter.serves("cpu") else 0.5
        bound = ulps * torch.finfo(dtype).eps * exact.abs() + 6e-8 * u.data.abs()
        assert ((w.data.double() - exact).abs() <= bound * 1.001).all()


@here
@pytest.mark.parametrize("columns", [False, True])
def test_rows_have_deviations_of_their_own(columns):
    whole, u = weight(30 * 200), weight(30 * 200)
    rows = torch.rand(200 if columns else 30, device=DEVICE)
    shape = torch.Size([30, 200])
    noise = RowNoise(
        0, 0, 0, 0.3, rows=RowFactors({0: rows}), columns=frozenset({0} if columns else ())
    )
    Noise(0, 0, 0, 0.3).add_to([u])
    factors = rows if columns else rows[:, None]
    exact = u.data.view(shape) * factors
    data = whole.data.view(shape)
    noise.add_to([Weight("w", 0, torch.nn.Parameter(data), data, 0, shape)])
    torch.testing.assert_close(data, exact, rtol=3e-7, atol=0)  # two products in another order
    for first, end in [(0, 777), (777, 4001), (4001, 6000)]:
        part = torch.zeros(end - first, device=DEVICE)
        noise.add_to([Weight("w", 0, torch.nn.Parameter(part), part, first, shape)])
        assert torch.equal(part, data.view(-1)[first:end])


@here
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_element_beyond_the_weight_is_touched(dtype):
    memory = torch.zeros(20_000, dtype=dtype, device=DEVICE)
    places = [(3, 1), (5, 4096), (4200, 4097), (9001, 0), (9002, 8191)]
    weights = [
        Weight("w", i, torch.nn.Parameter(memory[a : a + n]), memory[a : a + n], s, torch.Size([n]))
        for i, ((a, n), s) in enumerate(zip(places, [0, 3, 1, 0, 4094], strict=True))
    ]
    Noise(0, 0, 0, 1.0, "rademacher").add_to(weights)
    touched = torch.zeros(20_000, dtype=torch.bool)
    for a, n in places:
        touched[a : a + n] = True
    assert torch.equal(memory.cpu() != 0, touched)


@here
def test_weights_draws_steps_and_seeds_are_independent():
    n, draws = 20_000, []
    for coordinates in ["0000", "1000", "0100", "0010", "0001", "0110", "1100"]:
        seed, step, draw, index = map(int, coordinates)
        w = weight(n, index)
        Noise(seed, step, draw, 1.0).add_to([w])
        draws.append(w.data.cpu())
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlations.abs().max() < 4.5 / math.sqrt(n)  # of 21, each normal with 1/sqrt(n)


@here
def test_one_launch_for_all_weights_of_a_dtype(monkeypatch):
    from nso_hf.step import counter_kernel

    launches = []
    original = counter_kernel.launch
    monkeypatch.setattr(
        counter_kernel, "launch", lambda *args: (launches.append(args), original(*args))
    )
    weights = [weight(100 + i, i) for i in range(30)]
    weights += [weight(50, 30 + i, dtype=torch.bfloat16) for i in range(5)]
    Noise(0, 0, 0, 1.0).add_to(weights)
    assert len(launches) == 2
    assert all(abs(w.data.float().std() - 1) < 0.5 for w in weights)


@pytest.mark.parametrize(("name", "tensors"), [("gpt2", 148), ("llama", 146), ("llama-8b", 291)])
def test_one_launch_for_the_weights_of_real_models(monkeypatch, name, tensors):
    """Without memory or a GPU: what would be launched, and how often Python is called for it."""
    counter_kernel = pytest.importorskip("nso_hf.step.counter_kernel")
    launches, calls = [], 0
    monkeypatch.setattr(counter_kernel, "launch", lambda *args: launches.append(args))
    monkeypatch.setattr(counter, "serves", lambda device_type: True)
    on_it = SimpleNamespace(device=nullcontext)
    monkeypatch.setattr(torch, "get_device_module", lambda device: on_it)
    with torch.device("meta"):
        model = MODELS[name]()
    weights = [
        Weight(name, index, p, p.data, 0, p.shape)
        for index, (name, p) in enumerate(model.named_parameters())
    ]
    assert len(weights) == tensors
    Noise(0, 0, 0, 1.0).add_to(weights)  # the tables are made, once

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    launches.clear()
    sys.setprofile(count)
    Noise(0, 1, 0, 1.0).add_to(weights)
    sys.setprofile(None)
    (launch,) = launches
    assert launch[0].shape == (tensors, 8)  # a row of the table for each weight
    assert calls <= 40 * tensors

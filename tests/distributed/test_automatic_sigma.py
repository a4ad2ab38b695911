"""sigma="auto" on two processes is that of one, and so is what follows from it."""

import pytest

from nso_hf.curvature import find_sigma
from tests.distributed.back_ends import assert_is
from tests.distributed.launch import launch
from tests.reference import batched, largest_difference, reference_nso, tiny_llama, token_data

pytestmark = pytest.mark.distributed

CASE = {
    "sigma": "auto",
    "sigma_rise": 0.05,
    "sigma_scale": "relative",
    "per_device_train_batch_size": 4,
}


@pytest.mark.parametrize("back_end", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_are_one(back_end, tmp_path):
    cases = {"held": {"sigma_hold": True}, "one step": {"max_steps": 1}}
    ranks = launch({n: {"back_end": back_end, **CASE, **c} for n, c in cases.items()}, tmp_path)
    data = token_data(48)
    batches = [batched(data[i : i + 4]) for i in range(0, 16, 4)]
    options = {"rise": 0.05, "sigma_scale": "relative"}
    found = find_sigma(tiny_llama(), batches, num_samples=16, seed=42, **options)
    first, second = ranks
    for name in ("sigmas", "rises"):
        assert first["held"][name] == second["held"][name]
    assert len(set(first["held"]["sigmas"])) == 3
    for rank in ranks:
        assert_is(back_end, rank["held"], processes=2)
        (sigma,) = rank["one step"]["sigmas"]
        # Losses are rounded to 1e-7 of themselves, and the rise is a twentieth of one.
        assert sigma == pytest.approx(found.sigma, rel=1e-4)
        expected = tiny_llama()
        shared = {"steps": 1, "global_batch": 8, "sigma": sigma, "relative": True}
        reference_nso(expected, data, **shared)
        moved = largest_difference(expected, tiny_llama())
        assert moved > 1e-3
        # As in test_matrix.py, and the root mean squares of rows are rounded to 16 bits: in the
        # gradient, which is as far as the weights move, that is as much of the noise's part.
        tolerance = 1e-6 + 2**-16 * moved
        for p, w in zip(expected.parameters(), rank["one step"]["weights"], strict=True):
            assert (p - w).abs().max() <= tolerance

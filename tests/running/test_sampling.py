"""A part of the data that stands for all of it."""

from collections import Counter

import pytest

from nso_hf.running.sampling import drawn, places


def test_there_are_no_more_than_all():
    assert places(None, 3) == places(3, 3) == places(5, 3) == [0, 1, 2]
    for number in (None, 3, 5):
        assert drawn(iter("abc"), number) == (["a", "b", "c"], 3)
    assert drawn(iter(""), 3) == ([], 0)


@pytest.mark.parametrize("draw", [places, lambda n, total, seed: drawn(range(total), n, seed)[0]])
def test_each_is_drawn_as_often(draw):
    counts = Counter()
    for seed in range(2000):
        found = draw(3, 10, seed)
        assert found == sorted(set(found)) and len(found) == 3
        counts.update(found)
    # 600 of 2000 expected of each, with a standard deviation of sqrt(2000 .3 .7) = 20.5.
    assert all(abs(counts[place] - 600) < 4.5 * 20.5 for place in range(10))


def test_the_number_of_all_is_told():
    assert drawn(iter(range(100)), 7)[1] == 100
    assert drawn(iter(range(100)), 7, seed=1) != drawn(iter(range(100)), 7, seed=2)

"""Symmetric label noise: the share, the other classes alike, and the same again for a seed."""

import pytest
import torch

from nso_hf.companions import with_label_noise

LABELS = torch.arange(10).repeat(2000)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_a_share_of_the_labels_is_any_other(rate):
    noisy = with_label_noise(LABELS, rate=rate, num_labels=10, seed=1)
    assert torch.equal(noisy.changed, noisy.labels != LABELS)
    n = len(LABELS)
    # Four standard errors of a share of n draws.
    assert abs(noisy.changed.float().mean() - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5
    if rate == 0.8:
        shifts = (noisy.labels - LABELS)[noisy.changed] % 10
        counts = torch.bincount(shifts, minlength=10)
        expected = counts.sum() / 9
        assert counts[0] == 0
        # A count of draws with probability 1/9.
        assert (counts[1:] - expected).abs().max() <= 4 * expected**0.5
    assert LABELS[:10].tolist() == list(range(10))  # what was given is as it was


def test_a_seed_makes_the_same_and_another_does_not():
    a, b, c = (with_label_noise(LABELS, rate=0.4, num_labels=10, seed=s).labels for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    with_generator = with_label_noise(LABELS.tolist(), rate=0.4, num_labels=10, seed=generator)
    assert torch.equal(with_generator.labels, a)
    assert torch.equal(state, torch.get_rng_state())


def test_a_data_set_as_documented():
    datasets = pytest.importorskip("datasets")
    rows = {"x": list(range(40)), "label": [i % 4 for i in range(40)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column(
        "label", datasets.ClassLabel(names=["a", "b", "c", "d"])
    )
    noisy = with_label_noise(dataset["label"], rate=0.5, num_labels=4)
    changed = dataset.map(lambda _, i: {"label": noisy.labels[i].item()}, with_indices=True)
    assert changed["label"][:] == noisy.labels.tolist() != dataset["label"][:]
    assert changed["x"][:] == rows["x"] and changed.features == dataset.features

"""Which examples are trained on and which are judged by."""

from collections import Counter

import pytest
import torch

from nso_hf.tasks.classification.labels import classes_of, numbers_of
from nso_hf.tasks.classification.options import ProtocolOptions
from nso_hf.tasks.classification.splitting import few, hold_out

COUNTS = [120, 60, 19, 1]
CLASSES = ["a", "b", "c", "d"]


def labels():
    every = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    return every[torch.randperm(200, generator=torch.Generator().manual_seed(1))].tolist()


def split(seed=0, has_test=True, **options):
    protocol = ProtocolOptions(**options)
    return protocol.split(labels(), CLASSES, seed, has_test=has_test)


def test_splits_are_disjoint_and_stratified():
    """Of each class its share, to less than one example."""
    every, found = labels(), split(has_test=False, test_size=0.25, validation_size=40)
    assert sorted(found.train + found.validation + found.test) == list(range(200))
    assert (len(found.train), len(found.validation), len(found.test)) == (110, 40, 50)
    for part, share in ((found.test, 0.25), (found.validation, 0.2), (found.train, 0.55)):
        counts = Counter(every[i] for i in part)
        for label, number in enumerate(COUNTS):
            # Two deals, each to less than one.
            assert abs(counts[label] - share * number) < 2, (label, counts)
    assert found.labels.tolist() == [every[i] for i in found.train]
    assert not found.wrong


@pytest.mark.parametrize("number", [0, 1, 7, 50, 120, 199])
def test_held_out_to_less_than_one(number):
    every = torch.tensor(labels())
    kept, held = hold_out(every, number, torch.Generator().manual_seed(3))
    assert len(held) == number and sorted([*kept.tolist(), *held.tolist()]) == list(range(200))
    for label, count in enumerate(COUNTS):
        assert abs((every[held] == label).sum().item() - number * count / 200) < 1


def test_fewer_are_a_part_of_more():
    every = torch.tensor(labels())
    generators = (torch.Generator().manual_seed(3) for _ in range(4))
    one, five, more, other = (
        set(few(every, size, g).tolist())
        for size, g in zip((1, 5, 19, 19), generators, strict=True)
    )
    assert one < five < more == other
    assert [sum(every[i] == label for i in five).item() for label in range(4)] == [5, 5, 5, 1]
    balanced = torch.arange(4).repeat(50).tolist()
    parts = [
        set(ProtocolOptions(examples_per_class=k).split(balanced, CLASSES, 0, has_test=True).train)
        for k in (2, 10)
    ]
    assert parts[0] < parts[1] and len(parts[0]) == 8 and len(parts[1]) == 40


def test_the_seed_draws_them():
    assert split(0).train == split(0).train != split(1).train


def test_train_size_takes_of_each_class_its_share():
    every, found = labels(), split(train_size=90)
    counts = Counter(every[i] for i in found.train)
    # Of the 180 that are left of 200, half: each deal to less than one.
    assert all(abs(counts[label] - 0.45 * COUNTS[label]) < 2 for label in range(4))
    assert len(found.train) == 90 and not set(found.train) & set(found.validation)


def test_wrong_labels_are_in_training_alone():
    every = torch.arange(10).repeat(400)
    options = ProtocolOptions(label_noise=0.4, validation_size=0.5)
    found = options.split(every.tolist(), list("abcdefghij"), 0, has_test=True)
    assert found.true_labels.tolist() == every[found.train].tolist()
    changed = (found.labels != found.true_labels).nonzero().flatten().tolist()
    assert found.wrong == changed
    # 2,000 draws at .4: three standard deviations are .033.
    assert len(changed) / 2000 == pytest.approx(0.4, abs=0.033)
    clean = ProtocolOptions(validation_size=0.5)
    clean = clean.split(every.tolist(), list("abcdefghij"), 0, has_test=True)
    assert (clean.train, clean.validation) == (found.train, found.validation)
    assert found.labels.min() >= 0 and found.labels.max() <= 9


def test_too_few_examples():
    for message, options in {
        "validation_size=200: there are 200 examples. Lower it.": {"validation_size": 200},
        "validation_size=199: no training example of class 'b' would": {"validation_size": 199},
        "train_size=181: there are 180. Lower it": {"train_size": 181},
        "examples_per_class=2: of class 'd' there are 1. Use at most 1": {"examples_per_class": 2},
    }.items():
        with pytest.raises(ValueError, match=message):
            split(**options)


def test_options_out_of_their_range():
    for message, options in {
        "label_noise=1.5: must be a finite number, in": {"label_noise": 1.5},
        "validation_size=1.5: neither a share nor a number": {"validation_size": 1.5},
        "examples_per_class=0: must be an integer, at least 1": {"examples_per_class": 0},
        "examples_per_class=3: train_size=9 already": {"examples_per_class": 3, "train_size": 9},
    }.items():
        with pytest.raises(ValueError, match=message):
            ProtocolOptions(**options)


def test_classes_have_the_numbers_of_their_data_set():
    assert classes_of(["10", "9", "9"], "data", "x") == ["9", "10"]
    assert classes_of(["b", "a"], "data", "x") == ["a", "b"]
    assert classes_of(["b", "a"], "data", "x", ["b", "c", "a"]) == ["b", "c", "a"]
    assert numbers_of(["b", "a"], ["a", "b"], "data", "x") == [1, 0]
    with pytest.raises(ValueError, match="data='x': no training example has the class 'z'"):
        numbers_of(["b", "z"], ["a", "b"], "data", "x")
    with pytest.raises(ValueError, match=r"data='x': its examples have 1 class\(es\)"):
        classes_of(["b", "b"], "data", "x")

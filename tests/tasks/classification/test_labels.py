"""Classes have one number each, the same wherever they occur."""

import random

import pytest

from nso_hf.tasks.classification.labels import classes_of, numbers_of


@pytest.mark.parametrize(
    "ordered",
    [
        ["2", "10", "100"],
        ["-10", "-2", "0", "3"],
        ["-0.5", "0.25", "1e1", "30"],
        ["-1", "10", "2", "cat"],  # by the alphabet, where one is a text
        ["false", "true"],
        ["1", "nan"],
    ],
    ids=", ".join,
)
def test_numbers_are_ordered_by_size_and_texts_by_the_alphabet(ordered):
    labels = random.Random(0).sample(ordered * 3, 3 * len(ordered))
    classes = classes_of(labels, "data", "file")
    assert classes == ordered
    assert numbers_of(ordered, classes, "data", "file") == list(range(len(ordered)))


@pytest.mark.parametrize(
    ("one", "other"), [("1", "1.0"), ("01", "1"), ("0", "-0.0"), ("1000", "1e3")]
)
@pytest.mark.parametrize("others", [[], ["7"], ["cat"]])
def test_one_number_written_in_two_ways_is_not_two_classes(one, other, others):
    first, second = sorted([one, other])
    message = f"data='file': the classes '{first}' and '{second}' are one number"
    with pytest.raises(ValueError, match=message):
        classes_of([other, one, *others, "8"], "data", "file")


@pytest.mark.parametrize("names", [None, ["cat", "dog", "cow"]])
def test_a_class_that_no_training_example_has_is_not_tested_on(names):
    trained = ["dog", "cat", "dog"]
    classes = classes_of(trained, "data", "file", names)
    assert numbers_of(["dog"], classes, "data", "file", trained) == [1]
    with pytest.raises(ValueError, match="no training example has the class 'cow'"):
        numbers_of(["dog", "cow"], classes, "data", "file", trained)

"""The names of classes, from every kind of file that lists them, and what is chosen among."""

import json

import pytest
import torch
from accelerate import Accelerator

from nso_hf.tasks.clip.classification import class_names, linear_probe, zero_shot
from nso_hf.tasks.clip.encoding import encode
from nso_hf.tasks.clip.options import EvaluationOptions
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.table import Table
from tests.tasks.clip.reference import image_rows, tiny_clip
from tests.tasks.clip.test_pairs import png

INDEX = {
    "0": ["n01440764", "tench"],
    "1": ["n01443537", "goldfish"],
    "2": ["n01484850", "great_white_shark"],
}


def names(folder, entries, classes):
    path = folder / "names.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return EvaluationOptions(class_names=str(path)).names(classes)


@pytest.mark.parametrize(
    ("entries", "classes", "expected"),
    [
        (
            {"b": "a bee", "a": "an ant", "c": "a cat"},
            ["a"],
            {"b": "a bee", "a": "an ant", "c": "a cat"},
        ),
        (["zero", "one", "two"], ["2", "0"], {"0": "zero", "1": "one", "2": "two"}),
        (["cat", "dog"], ["dog"], {"cat": "cat", "dog": "dog"}),
        (INDEX, ["1"], {"0": "tench", "1": "goldfish", "2": "great white shark"}),
        (
            INDEX,
            ["n01484850"],
            {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"},
        ),
    ],
)
def test_every_named_class_is_a_candidate(tmp_path, entries, classes, expected):
    assert names(tmp_path, entries, classes) == expected


@pytest.mark.parametrize(
    ("entries", "rule"),
    [
        ({"a": "an ant", "b": None}, "the name of class 'b' is null, no text"),
        ({"a": "an ant", "b": ["bee", "bug"]}, "the name of class 'b' is a list, no text"),
        ({"a": 0}, "the name of class 'a' is a number, no text"),
        ({"a": ["n01440764", "tench"], "1": ["n01443537", None]}, "the name of class '1' is null"),
        ({"a": " "}, "the name of class 'a' is a text without letters"),
        (["zero"], "has no name for the classes a"),
        ("a", "neither a mapping nor a list"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, entries, rule):
    with pytest.raises(ValueError, match=rf"class_names='.*names.json': {rule}"):
        names(tmp_path, entries, ["a"])


def test_without_names_the_classes_are_those_that_occur():
    assert EvaluationOptions().names(["b", "a", "b"]) == {"a": "a", "b": "b"}


def test_one_class_is_told_from_the_others_that_are_named():
    assert class_names(["cat", None], "data", ["cat", "dog"]) == ["cat"]
    with pytest.raises(ValueError, match="its images have no class"):
        class_names([None], "data", ["cat", "dog"])


def test_classes_of_a_data_set_without_images(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = [{"image": {"bytes": png(n), "path": None}, "label": n} for n in (0, 2)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path))
    pairs = open_pairs(str(tmp_path), Fields(label="label"))
    assert list(pairs.classes) == ["cat", "dog", "emu"] and pairs.labels() == ["cat", "emu"]


def test_zero_shot_chooses_among_classes_without_images():
    """Each image as brute force over all candidates has it; figures of a class are its images'."""
    clip = tiny_clip()
    clip.model.eval()
    data = [{**row, "label": "ab"[i % 2]} for i, row in enumerate(image_rows(9))]
    table = Table("rows", data, Fields("image", "caption", "label"), None)
    images = encode(clip.model, clip, table, Accelerator(cpu=True), batch_size=4, needs="label")
    candidates = list("abcdefgh")
    result, predicted = zero_shot(clip.model, clip, images, candidates, ["{}"], device="cpu")
    with torch.no_grad():
        texts = clip.model.encode_text(clip.tokenizer(candidates), normalize=True)
        pixels = torch.stack([clip.eval_transform(row["image"]) for row in data])
        best = (clip.model.encode_image(pixels, normalize=True) @ texts.T).argmax(dim=1)
    assert torch.equal(predicted, best)
    assert (result.classes, result.chance, result.majority) == (8, 1 / 8, 5 / 9)
    assert result.top5 is not None
    assert set(result.per_class) == {"a", "b"}
    for number, label in enumerate("ab"):
        right = (best[number::2] == number).double().mean().item()
        of_class = result.per_class[label]
        assert (of_class.images, of_class.accuracy) == (5 - number, pytest.approx(right))
    probe = linear_probe(images, class_names(images.labels, "rows", candidates))
    assert probe.classes == 2 and set(probe.per_class) == {"a", "b"}

"""CLIP models with changed weights, against open_clip's own functions on copies changed by hand."""

import math
from copy import deepcopy

import numpy as np
import open_clip
import pytest
import torch

from nso_hf.robustness import pruned, robustness, round_to_nearest, weight_noise
from nso_hf.robustness.figures import figures
from nso_hf.robustness.matrices import matrices
from nso_hf.running.sampling import places
from nso_hf.tasks.clip.labelled import Labelled
from nso_hf.tasks.clip.matching import matching, zero_shot_classification
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.table import Table
from tests.tasks.clip.reference import image_rows, open_clip_loss, tiny_clip

PROMPTS = ("a picture of {}", "{}!", "the {} one")
NAMES = {"even": "even", "odd": "odd", "prime": "few"}
NOTHING = {"bits": (), "noise": (), "relative_noise": (), "sparsity": ()}


def rows(number):
    return Table("rows", image_rows(number), Fields("image", "caption", "label"), None)


def classifier(clip, number=11, size=4):
    labelled = Labelled(rows(20), ["even", "odd"], NAMES)
    return zero_shot_classification(clip, labelled, PROMPTS, number=number, size=size)


def pixels(clip, number, of=None):
    """Of the first images, or of those that are drawn from `of`."""
    chosen = image_rows(number) if of is None else [image_rows(of)[i] for i in places(number, of)]
    return torch.stack([clip.eval_transform(row["image"]) for row in chosen])


@torch.no_grad()
def logits_of(model, clip, number=11):
    """By open_clip's `encode_image` and `encode_text`, an image and a class at a time."""
    model.eval()
    classes = []
    for name in NAMES.values():
        texts = [model.encode_text(clip.tokenizer([p.format(name)]))[0] for p in PROMPTS]
        mean = sum(text / text.norm() for text in texts) / len(texts)
        classes.append(mean / mean.norm())
    images = [model.encode_image(image[None])[0] for image in pixels(clip, number, of=20)]
    scale = math.exp(model.logit_scale.item())
    return torch.tensor([[scale * (i / i.norm()) @ c for c in classes] for i in images])


CHANGED = (".in_proj_weight", ".out_proj.weight", ".c_fc.weight", ".c_proj.weight", "conv1.weight")


def quantised(model, bits, group_size):
    """A copy, its matrices rounded in numpy, a group of one row after another."""
    copied = deepcopy(model)
    number = 0
    for name, weight in copied.named_parameters():
        if not name.endswith(CHANGED):
            continue
        number += 1
        matrix = weight.detach().numpy().reshape(len(weight), -1)
        for row in matrix:
            for start in range(0, len(row), group_size or len(row)):
                group = row[start : start + (group_size or len(row))]
                step = np.float32(np.abs(group).max()) / np.float32(2 ** (bits - 1) - 1)
                group[:] = np.rint(group / step) * step
    assert number == 2 * (2 * 4) + 1  # of two towers of two layers, and the patches
    return copied


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (3, None), (2, None), (4, 6)])
def test_quantised_logits_are_those_of_a_copy_quantised_by_hand(kind, bits, group_size):
    clip = tiny_clip(kind)
    model, (batch,) = classifier(clip)
    expected = logits_of(quantised(clip.model, bits, group_size), clip)
    model.eval()
    with torch.no_grad(), round_to_nearest(model, bits=bits, group_size=group_size):
        found = model(**batch)["logits"]
    with torch.no_grad():
        plain = model(**batch)["logits"]
    # Logits up to 14 from sums of some ten thousand products in float32, in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=14 * 1e-5)
    torch.testing.assert_close(plain, logits_of(clip.model, clip), rtol=0, atol=14 * 1e-5)
    assert (found - plain).abs().max() > 14 * 1e-4


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_figures_of_zero_shot_classification(kind):
    clip = tiny_clip(kind)
    model, batches = classifier(clip, number=15)
    (row,) = robustness(model, batches, **NOTHING)
    clip.model.eval()
    classifier_of = open_clip.build_zero_shot_classifier
    weights = classifier_of(clip.model, clip.tokenizer, list(NAMES.values()), PROMPTS)
    with torch.no_grad():
        scores = clip.model.encode_image(pixels(clip, 15, of=20), normalize=True) @ weights
    logits = (scores * clip.model.logit_scale.exp().item()).double().numpy()
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    target = np.array(places(15, 20)) % 2
    losses, right = -np.log(p[np.arange(15), target]), p.argmax(axis=1) == target
    # Logits of 14 have roundings of 1e-5 or so, as above.
    assert row.loss == pytest.approx(losses.mean(), abs=1e-4)
    assert row.stderr == pytest.approx(losses.std(ddof=1) / math.sqrt(15), abs=1e-4)
    assert row.accuracy == right.mean()
    ece = 0.0
    for number in range(15):  # bins
        confidence = p.max(axis=1)
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        ece += abs((right[inside] - confidence[inside]).sum()) / 15  # images
    assert row.ece == pytest.approx(ece, abs=1e-4)


def test_it_is_right_as_often_as_the_recipe_says():
    from accelerate import Accelerator

    from nso_hf.tasks.clip.classification import zero_shot
    from nso_hf.tasks.clip.encoding import encode

    clip = tiny_clip()
    encoded = encode(clip.model, clip, rows(20), Accelerator(cpu=True), batch_size=8, needs="label")
    names = list(NAMES.values())
    theirs, _ = zero_shot(clip.model, clip, encoded, list(NAMES), PROMPTS, names, device="cpu")
    (row,) = robustness(*classifier(clip, number=50), **NOTHING)
    assert row.accuracy == theirs.top1


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_the_loss_among_pairs_is_open_clip_s(kind):
    clip = tiny_clip(kind)
    model, batches = matching(clip, rows(20), number=14, size=4)
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4, 2]
    (row,) = robustness(model, batches, **NOTHING)
    clip.model.eval()
    texts = clip.tokenizer([row["caption"] for row in image_rows(14)])
    losses, right, images = [], 0, pixels(clip, 14)
    for start in range(0, 14, 4):
        part = slice(start, start + 4)
        with torch.no_grad():
            i = clip.model.encode_image(images[part], normalize=True)
            t = clip.model.encode_text(texts[part], normalize=True)
            loss = open_clip_loss("clip")(i, t, clip.model.logit_scale.exp())
        losses.append(loss.item())
        for queries, candidates in ((i, t), (t, i)):
            for number, query in enumerate(queries):
                scores = [float(query @ candidate) for candidate in candidates]
                right += scores.index(max(scores)) == number
    sizes = [4, 4, 4, 2]
    mean = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / 14
    assert row.loss == pytest.approx(mean, abs=1e-4)
    assert row.accuracy == pytest.approx(right / 28)
    assert row.stderr > 0 and 0 < row.ece < 1


def test_a_pair_alone_is_left_out_and_refused_where_there_is_no_other():
    clip = tiny_clip()
    _, batches = matching(clip, rows(20), number=9, size=4)
    assert [len(batch["image"]) for batch in batches] == [4, 4]
    with pytest.raises(ValueError, match=r"data='rows': of 9 pairs in batches of 1 none has"):
        matching(clip, rows(20), number=9, size=1)


def test_examples_that_cannot_be_used_are_passed_over_and_counted_by_others():
    clip, broken = tiny_clip(), [{"image": b"", "caption": "x", "label": "odd"}]
    table = Table("rows", broken + image_rows(5), Fields("image", "caption", "label"), None)
    _, (batch,) = matching(clip, table, number=3, size=8)
    torch.testing.assert_close(batch["image"], pixels(clip, 3), rtol=0, atol=0)
    labelled = Labelled(table, ["even", "odd"], NAMES)
    _, (batch,) = zero_shot_classification(clip, labelled, PROMPTS, number=3, size=8)
    assert batch["labels"].tolist() == [(i - 1) % 2 for i in places(3, 6) if i > 0]
    assert table.skipped.counts == {}
    empty = Table("rows", broken, Fields("image", "caption", "label"), None)
    with pytest.raises(ValueError, match=r"nothing of it could be used .*1 unreadable images"):
        matching(clip, empty, number=3, size=2)


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_the_model_is_left_as_it_was(kind):
    clip = tiny_clip(kind)
    clip.model.train()
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    for model, batches in (classifier(clip), matching(clip, rows(20), number=8, size=4)):
        found = robustness(model, batches, num_samples=2)
        assert len({row.loss for row in found}) == len(found)
        assert clip.model.training
        after = clip.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_texts_are_encoded_by_the_changed_weights_alone():
    """Where the image tower stays, so do the images."""
    clip = tiny_clip()
    model, (batch,) = classifier(clip)
    model.eval()
    text_tower = clip.model.transformer
    contexts = [
        round_to_nearest(text_tower, bits=2),
        weight_noise(text_tower, std=0.05),
        pruned(text_tower, sparsity=0.9),
    ]
    plain = figures(model, [batch]).loss
    for context in contexts:
        with context:
            expected = logits_of(clip.model, clip)
            with torch.no_grad():
                found = model(**batch)["logits"]
            torch.testing.assert_close(found, expected, rtol=0, atol=14 * 1e-5)
            assert figures(model, [batch]).loss != plain
    assert figures(model, [batch]).loss == plain


def test_all_weights_of_attention_are_matrices():
    together = torch.nn.MultiheadAttention(8, 2)
    apart = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert [tuple(m.shape) for m in matrices(together)] == [(24, 8), (8, 8)]
    assert [tuple(m.shape) for m in matrices(apart)] == [(8, 8), (8, 6), (8, 4), (8, 8)]
    before = [p.detach().clone() for p in apart.parameters()]
    with pruned(apart, sparsity=0.5):
        assert (apart.k_proj_weight == 0).sum() == 24
    assert all(torch.equal(p, w) for p, w in zip(apart.parameters(), before, strict=True))

"""Retrieval, zero-shot classification and the probe against brute force and open_clip's script."""

import math

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from open_clip_train.train import get_clip_metrics
from sklearn.linear_model import LogisticRegression

import nso_hf.tasks.clip.retrieval as retrieval_module
from nso_hf.tasks.clip.classification import class_names, linear_probe, zero_shot
from nso_hf.tasks.clip.encoding import Encoded, encode
from nso_hf.tasks.clip.loss import contrastive_loss
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.retrieval import retrieval
from nso_hf.tasks.clip.table import Table
from tests.tasks.clip.reference import image_rows, tiny_clip


def encoded(images, texts, keys=None, captions=None, labels=None):
    n = len(images)
    keys = keys or [str(i) for i in range(n)]
    captions = captions or [f"caption {i}" for i in range(n)]
    return Encoded(images, texts, keys, captions, labels or [None] * n, list(range(n)), 0.0)


def features(n, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_retrieval_is_that_of_open_clip(chunk, monkeypatch):
    monkeypatch.setattr(retrieval_module, "_CHUNK", chunk)
    images, texts = features(40), features(40, seed=1)
    texts = torch.nn.functional.normalize(texts + images, dim=1)
    metrics = retrieval(encoded(images, texts)).metrics
    theirs = get_clip_metrics(images, texts, logit_scale=torch.tensor(14.0))
    assert 1 < metrics["image_to_text_mean_rank"] < 20
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert metrics[f"{direction}_recall@{k}"] == theirs[f"{direction}_R@{k}"]
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(theirs[f"{direction}_mean_rank"])
        # Theirs is rounded down.
        median = math.floor(metrics[f"{direction}_median_rank"])
        assert median == theirs[f"{direction}_median_rank"]


def test_several_captions_of_an_image_and_several_images_of_a_caption():
    images, texts = features(30), features(30, seed=1)
    keys = [f"image {i % 12}" for i in range(30)]
    captions = [f"caption {i % 20}" for i in range(30)]
    images = torch.stack([images[int(key.split()[1])] for key in keys])
    texts = torch.stack([texts[int(caption.split()[1])] for caption in captions])
    found = retrieval(encoded(images, texts, keys, captions))
    for queries, candidates, ranks in [
        ((keys, images), (captions, texts), found.image_to_text),
        ((captions, texts), (keys, images), found.text_to_image),
    ]:
        expected = {}
        for query, feature in zip(*queries, strict=True):
            scores = {c: float(f @ feature) for c, f in zip(*candidates, strict=True)}
            right = {c for q, c in zip(queries[0], candidates[0], strict=True) if q == query}
            best = max(scores[c] for c in right)
            expected[query] = 1 + sum(s >= best for c, s in scores.items() if c not in right)
        assert ranks.tolist() == [expected[query] for query in sorted(expected)]
    assert found.candidates == (20, 12)


def test_chance_is_what_random_rankings_give():
    keys = [f"image {i // 2}" for i in range(24)]  # two captions each
    total = {}
    draws = 400
    for seed in range(draws):
        images, texts = features(12, 24, seed)[:, :], features(24, 24, seed + 10**6)
        images = images.repeat_interleave(2, dim=0)
        result = retrieval(encoded(images, texts, keys))
        for name, value in result.metrics.items():
            total.setdefault(name, []).append(value)
    for name, expected in result.chance.items():
        values = np.array(total[name])
        stderr = values.std() / math.sqrt(draws)
        assert values.mean() == pytest.approx(expected, abs=4 * stderr), name


def test_a_collapsed_model_is_last_not_first():
    same = torch.ones(10, 4) / 2
    metrics = retrieval(encoded(same, same)).metrics
    assert metrics["image_to_text_recall@5"] == 0
    assert metrics["text_to_image_mean_rank"] == 10


@pytest.mark.parametrize("broken", ["images", "texts", "both"])
def test_a_diverged_model_is_last(broken):
    good, bad = features(10), torch.full((10, 6), torch.nan)
    images = good if broken == "texts" else bad
    metrics = retrieval(encoded(images, good if broken == "images" else bad)).metrics
    assert metrics["image_to_text_recall@5"] == metrics["text_to_image_recall@5"] == 0
    assert metrics["text_to_image_mean_rank"] == 10


def test_a_diverged_model_classifies_nothing():
    clip = tiny_clip()
    images = encode(clip.model, clip, rows(8), Accelerator(cpu=True), batch_size=4, needs="label")
    with torch.no_grad():
        clip.model.text_projection.fill_(torch.nan)
    result, _ = zero_shot(clip.model, clip, images, ["even", "odd"], ["{}"], device="cpu")
    assert result.top1 == 0
    bad = encoded(torch.full((8, 6), torch.nan), None, labels=["a", "b"] * 4)
    assert linear_probe(bad, ["a", "b"]).top1 == 0


def test_one_image_in_several_rows_is_one_candidate():
    """As COCO's captions come in tables and shards: each with a copy of the image."""
    clip = tiny_clip()
    examples = [{**row, "caption": f"{row['caption']} {i}"} for row in image_rows(4) for i in "abc"]
    table = Table("rows", examples, Fields("image", "caption", "label"), None)
    loss = contrastive_loss(clip.model)
    result = encode(clip.model, clip, table, Accelerator(cpu=True), batch_size=5, loss=loss)
    found = retrieval(result)
    assert found.candidates == (12, 4)
    assert [right.tolist() for right in found.right] == [[3] * 4, [1] * 12]


def test_workers_are_started_once_and_count_once():
    rows_ = [{"image": b"", "caption": "x"}, *image_rows(9)]
    table = Table("rows", rows_, Fields("image", "caption"), None)
    clip = tiny_clip()
    for workers in (0, 2):
        loss = contrastive_loss(clip.model)
        encode(
            clip.model, clip, table, Accelerator(cpu=True), batch_size=4, loss=loss, workers=workers
        )
        assert table.skipped.counts == {"unreadable images": 1}


def rows(n):
    return Table("rows", image_rows(n), Fields("image", "caption", "label"), None)


def test_encoding_is_that_of_the_model_and_leaves_it_as_it_was():
    clip = tiny_clip()
    clip.model.train()
    loss = contrastive_loss(clip.model)
    state = torch.get_rng_state()
    result = encode(clip.model, clip, rows(11), Accelerator(cpu=True), batch_size=4, loss=loss)
    assert clip.model.training and torch.equal(state, torch.get_rng_state())
    clip.model.eval()
    images = torch.stack([clip.eval_transform(row["image"]) for row in image_rows(11)])
    texts = clip.tokenizer([row["caption"] for row in image_rows(11)])
    with torch.no_grad():
        outputs = clip.model(images, texts)
        parts = [clip.model(images[i : i + 4], texts[i : i + 4]) for i in (0, 4, 8)]
        losses = [open_clip.ClipLoss()(**part).item() for part in parts]
    # Kernels for 4 and for 11 images differ by roundings.
    torch.testing.assert_close(result.images, outputs["image_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.texts, outputs["text_features"], rtol=0, atol=1e-5)
    assert result.loss == pytest.approx((4 * losses[0] + 4 * losses[1] + 3 * losses[2]) / 11)
    assert result.labels == [row["label"] for row in image_rows(11)]


def test_nothing_to_encode_is_an_error():
    clip = tiny_clip()
    empty = Table("rows", [{"image": b"", "caption": "x"}] * 3, Fields("image", "caption"), None)
    loss = contrastive_loss(clip.model)
    with pytest.raises(ValueError, match=r"nothing of it could be used .*3 unreadable images"):
        encode(clip.model, clip, empty, Accelerator(cpu=True), batch_size=2, loss=loss)


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_zero_shot_is_that_of_open_clip(kind):
    clip = tiny_clip(kind)
    clip.model.eval()
    examples = [{**row, "label": "abcdefg"[i % 7]} for i, row in enumerate(image_rows(23))]
    table = Table("rows", examples, Fields("image", "caption", "label"), None)
    images = encode(clip.model, clip, table, Accelerator(cpu=True), batch_size=4, needs="label")
    classes = class_names(images.labels, "rows")
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
    ours, predicted = zero_shot(clip.model, clip, images, classes, templates, device="cpu")
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, classes, templates)
    pixels = torch.stack([clip.eval_transform(row["image"]) for row in examples])
    target = torch.tensor([classes.index(row["label"]) for row in examples])
    with torch.no_grad():
        scores = clip.model.encode_image(pixels, normalize=True) @ theirs
    ranks = (scores > scores[torch.arange(23), target][:, None]).sum(dim=1)
    assert ours.top1 == pytest.approx((ranks < 1).double().mean().item())
    assert ours.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert (ours.chance, ours.classes, ours.images) == (1 / 7, 7, 23)
    right = predicted == target
    shares = [right[target == c].double().mean().item() for c in range(7)]
    assert ours.mean_per_class == pytest.approx(sum(shares) / 7)
    assert ours.majority == pytest.approx(4 / 23)


def test_names_of_classes_go_into_the_prompts():
    clip = tiny_clip()
    images = encode(clip.model, clip, rows(8), Accelerator(cpu=True), batch_size=4, needs="label")
    seen = []
    clip = type(clip)(**{**vars(clip), "tokenizer": lambda t: seen.extend(t) or tiny_tokens(t)})
    names = ["pair number", "lone number"]
    result, _ = zero_shot(
        clip.model, clip, images, ["even", "odd"], ["{}!", "a {}"], names, device="cpu"
    )
    assert seen == ["pair number!", "a pair number", "lone number!", "a lone number"]
    assert result.top5 is None


def tiny_tokens(texts):
    return tiny_clip().tokenizer(texts)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="labels='x': its images have the one class cat: nothing"):
        class_names(["cat", None, "cat"], "x")


def test_the_linear_probe_is_logistic_regression_on_the_other_half():
    classes = ["a", "b", "c"]
    labels = [classes[i % 3] for i in range(60)]
    centres = features(3, 8, seed=5)
    images = torch.stack([centres[i % 3] for i in range(60)]) + 0.4 * features(60, 8, seed=6)
    images = torch.nn.functional.normalize(images, dim=1)
    result = linear_probe(encoded(images, None, labels=labels), classes, C=1.0)
    from sklearn.model_selection import StratifiedKFold

    target, right = np.array([i % 3 for i in range(60)]), 0
    folds = StratifiedKFold(2, shuffle=True, random_state=0).split(images, target)
    for fit, test in folds:
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(images[fit].numpy(), target[fit])
        right += (probe.predict(images[test].numpy()) == target[test]).sum()
    assert result.top1 == pytest.approx(right / 60)
    assert result.top1 > 0.6
    lonely = encoded(images[:3], None, labels=classes)
    with pytest.raises(ValueError, match="a probe needs two classes with two images or more"):
        linear_probe(lonely, classes)

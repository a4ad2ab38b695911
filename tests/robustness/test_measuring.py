"""What of a model survives, against computations of the same by other means."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from nso_hf.robustness import pruned, robustness, round_to_nearest, weight_noise
from nso_hf.robustness.figures import figures
from tests.reference import tiny_llama

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NOTHING = {"bits": (), "noise": (), "relative_noise": (), "sparsity": ()}


def classifier(labels=5):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=labels, **SIZES))


def class_batches(sizes=(8, 8, 5), labels=5):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(40, (size, 7), generator=generator),
            "labels": torch.randint(labels, (size,), generator=generator),
        }
        for size in sizes
    ]


def language_batches():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(32, (9, 12), generator=generator)
    labels = ids.masked_fill(torch.rand(9, 12, generator=generator) < 0.3, -100)
    return [{"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]


def test_a_classifier_s_figures_are_sklearn_s():
    model, batches = classifier(), class_batches()
    (row,) = robustness(model, batches, **NOTHING)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches]).double()
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    p = logits.softmax(dim=1).numpy()
    assert (row.kind, row.strength) == ("none", None)
    # Means of 21 logarithms in float32.
    assert row.loss == pytest.approx(log_loss(labels, p, labels=range(5)), rel=1e-6)
    assert row.accuracy == accuracy_score(labels, p.argmax(axis=1))
    each = -np.log(p[np.arange(21), labels])
    assert row.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(21), rel=1e-5)
    right = p.argmax(axis=1) == labels
    assert row.accuracy_stderr == pytest.approx(right.std(ddof=1) / math.sqrt(21), rel=1e-6)
    confidence, edges, ece = p.max(axis=1), np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert row.ece == pytest.approx(ece, rel=1e-6)


def test_a_language_model_s_loss_is_by_tokens_and_its_error_by_texts():
    model, batches = tiny_llama(), language_batches()
    (row,) = robustness(model, batches, **NOTHING)
    losses, counts, right = [], [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits.double()
        for text, labels in zip(logits, batch["labels"], strict=True):
            known = [(text[t], labels[t + 1]) for t in range(11) if labels[t + 1] != -100]
            losses.append(sum(-z.log_softmax(0)[y].item() for z, y in known))
            right.append(sum(int(z.argmax() == y) for z, y in known))
            counts.append(len(known))
    assert row.loss == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert row.accuracy == sum(right) / sum(counts)
    # The error of a ratio, against drawing the texts anew.
    generator = np.random.default_rng(0)
    drawn = generator.integers(9, size=(20_000, 9))
    means = np.array(losses)[drawn].sum(axis=1) / np.array(counts)[drawn].sum(axis=1)
    # The bootstrap's variance is (n - 1)/n of the other; both to the second order in 1/9.
    assert row.stderr == pytest.approx(means.std() * math.sqrt(9 / 8), rel=0.15)


def test_tokens_with_a_class_each():
    torch.manual_seed(0)
    tagger = BertForTokenClassification(BertConfig(num_labels=3, **SIZES)).eval()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, decoder_start_token_id=0, **sizes),
    ).eval()
    ids = torch.randint(40, (4, 6))
    labels = torch.randint(3, (4, 6)).masked_fill(torch.rand(4, 6) < 0.3, -100)
    for model in (tagger, t5):
        (row,) = robustness(model, [{"input_ids": ids, "labels": labels}], **NOTHING)
        with torch.no_grad():
            outputs = model(input_ids=ids, labels=labels)
        assert row.loss == pytest.approx(outputs.loss.item(), rel=1e-5)
        right = (outputs.logits.argmax(-1) == labels)[labels != -100]
        assert row.accuracy == pytest.approx(right.double().mean().item())


class Regression(nn.Module):
    """A loss that is no cross-entropy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels):
        predicted = self.layer(x)[:, 0]
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def test_other_losses_are_weighted_by_their_examples():
    model, x, y = Regression(), torch.randn(10, 3), torch.randn(10)
    batches = [{"x": x[:7], "labels": y[:7]}, {"x": x[7:], "labels": y[7:]}]
    (row,) = robustness(model, batches, **NOTHING)
    with torch.no_grad():
        assert row.loss == pytest.approx(model(x, y)["loss"].item(), rel=1e-6)
    assert row.accuracy is None and row.ece is None and row.stderr > 0


def test_a_model_that_gives_no_numbers_is_measured_all_the_same():
    model = classifier()
    model.classifier.weight.data.fill_(math.nan)
    drawn = NOTHING | {"noise": (0.1,), "relative_noise": (0.1,)}
    for row in robustness(model, class_batches(), **drawn, num_samples=3):
        assert math.isnan(row.loss) and math.isnan(row.ece) and row.accuracy < 1


@pytest.mark.parametrize("kind", ["noise", "relative_noise"])
def test_noise_too_large_for_any_number_has_a_row_too(kind):
    first, last = robustness(classifier(), class_batches(), **NOTHING | {kind: (1e38,)})
    assert math.isfinite(first.loss) and math.isfinite(first.stderr)
    assert not math.isfinite(last.loss) and math.isnan(last.stderr)


def test_rows_are_those_of_the_models_in_the_contexts():
    model, batches = classifier(), class_batches()
    rows = robustness(
        model,
        batches,
        bits=(4, 2),
        noise=(0.05,),
        relative_noise=(0.3,),
        sparsity=(0.5,),
        num_samples=3,
        group_sizes=(None, 8),
        seed=5,
    )
    kinds = ["none", "bits", "bits", *["bits in groups of 8"] * 2]
    assert [row.kind for row in rows] == [*kinds, "noise", "relative noise", "sparsity"]
    assert [row.strength for row in rows] == [None, 4, 2, 4, 2, 0.05, 0.3, 0.5]
    model.eval()

    def loss(context):
        with context:
            return figures(model, batches).loss

    assert rows[2].loss == loss(round_to_nearest(model, bits=2))
    assert rows[3].loss == loss(round_to_nearest(model, bits=4, group_size=8))
    assert rows[7].loss == loss(pruned(model, sparsity=0.5))
    draws = [loss(weight_noise(model, std=0.05, seed=15 + draw)) for draw in range(3)]
    assert rows[5].loss == pytest.approx(np.mean(draws))
    assert len({*draws, rows[0].loss}) == 4
    assert rows[5].stderr > np.std(draws, ddof=1) / math.sqrt(3)


def test_the_model_is_left_as_it_was():
    model, batches = classifier(), class_batches()
    model.train()
    model.bert.encoder.eval()
    model(**batches[0]).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    robustness(model, iter(batches))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_after_an_error_too():
    model, batches = classifier(), class_batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def fail(module, inputs):
        calls.append(module)
        if len(calls) > len(batches):  # in the first change
            raise KeyboardInterrupt

    model.classifier.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        robustness(model, batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_its_level(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 400), nn.Conv2d(30, 40, 5))
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.1, 10, 400)[:, None]
    model.to(dtype)
    before = [layer.weight.detach().clone() for layer in model]
    biases = [layer.bias.detach().clone() for layer in model]
    with weight_noise(model, std=0.1, seed=3):
        for layer, weight in zip(model, before, strict=True):
            moved = (layer.weight.double() - weight.double()).std().item()
            # 30,000 and more draws: five standard errors; the sums are rounded to bfloat16, of
            # numbers up to 0.5 to 2^-9 of them.
            assert moved == pytest.approx(0.1, rel=5 / math.sqrt(2 * weight.numel()) + 2e-3)
    with weight_noise(model, std=0.1, relative=True, seed=3):
        rows = before[0].double()
        moved = (model[0].weight.double() - rows).square().mean(dim=1).sqrt()
        ratio = moved / rows.square().mean(dim=1).sqrt()
        # 500 draws a row: the largest of 400 is at 3.7 standard errors or so.
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1), rtol=0.2, atol=0)
        assert ratio.mean().item() == pytest.approx(0.1, rel=0.01)
    for layer, weight, bias in zip(model, before, biases, strict=True):
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_the_smallest_weights_are_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Conv2d(3, 4, 5))
    before = [layer.weight.detach().clone() for layer in model]
    with pruned(model, sparsity=0.7):
        for layer, weight in zip(model, before, strict=True):
            kept = layer.weight != 0
            assert int((~kept).sum()) == round(0.7 * weight.numel())
            assert torch.equal(layer.weight[kept], weight[kept])
            assert weight[~kept].abs().max() <= weight[kept].abs().min()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, before, strict=True))


def test_weights_that_layers_share_are_changed_once():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = model.lm_head.weight.detach().clone()
    with weight_noise(model, std=0.1):
        moved = (model.lm_head.weight - before).std().item()
        assert moved == pytest.approx(0.1, rel=0.1)  # not sqrt(2) of it; 1,600 draws or more
        assert model.get_input_embeddings().weight is model.lm_head.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (1,)}, "bits=1: not a whole number from 2 to 16"),
        ({"noise": (0.0,)}, "noise=0.0: must be a finite number above 0"),
        ({"relative_noise": (math.inf,)}, "relative_noise=inf: must be a finite number above 0"),
        ({"sparsity": (1.0,)}, "sparsity=1.0: not a share above 0 and below 1"),
        ({"group_sizes": (0,)}, "group_size=0: not a whole number above 0"),
        ({"num_samples": 0}, "num_samples=0: must be an integer, at least 1"),
        ({"batches": []}, r"batches=\[\]: there are none"),
        ({"model": nn.LayerNorm(3)}, "model='LayerNorm': it has no linear or convolution layer"),
    ],
)
def test_what_is_refused(options, message):
    given = {"model": classifier(), "batches": class_batches()} | options
    with pytest.raises(ValueError, match=message):
        robustness(**given)

"""`nso robustness` on what the CLIP recipe writes, and `--robustness` of that recipe."""

import json
import re
import subprocess
import sys

import open_clip
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from nso_hf.refusal import MissingPackage
from nso_hf.robustness import average, round_to_nearest
from nso_hf.robustness.__main__ import main as measure
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.images.reading import read_image
from recipes.clip_pretraining import main
from tests.recipes.test_clip_recipe import ROOT, flags, results_of
from tests.tiny_models import byte_tokenizer, save_model

FEW = ["--bits", "4", "--group_sizes", "none", "--noise", "--relative_noise", "--sparsity", "0.5"]
NOTHING = ["--bits", "--noise", "--relative_noise", "--sparsity"]
ZERO_SHOT = ["--label_column", "kind", "--templates", "simple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of the recipe that began with the same weights, measured as they were trained."""
    folder = tmp_path_factory.mktemp("clip")
    options = {"robustness": "true", "learning_rate": 1e-2, "warmup_steps": 0}
    main(flags(folder, folder / "pairs", **options))
    options |= {"zero_shot_data": folder / "s-001.tar", "label_column": "kind"}
    options |= {"templates": "simple", "robustness_examples": 7, "max_steps": 6}
    main(flags(folder, folder / "classes", **options))
    return folder


def measured(folder, output, *words):
    measure([*map(str, words), "--output", str(output)])
    return json.loads((output / "results.json").read_text())["checkpoints"]


def figures(row):
    return [row[name] for name in ("loss", "stderr", "accuracy", "accuracy_stderr", "ece")]


def test_pairs(folder, tmp_path, capsys):
    run, data = folder / "pairs", folder / "s-000.tar"
    found = measured(folder, tmp_path, run, *FEW, "--data", data, "--batch_size", 4)
    rows, trained = found[str(run)], results_of(run)
    assert [row["kind"] for row in rows] == ["none", "bits", "sparsity"]
    # All 12 held-out pairs, in the batches of the evaluation.
    assert rows[0]["loss"] == pytest.approx(trained["validation_loss"], rel=1e-5)
    by_recipe = {(row["kind"], row["strength"]): row for row in trained["robustness"]}
    assert len(by_recipe) == 20
    for row in rows:
        assert figures(row) == pytest.approx(figures(by_recipe[row["kind"], row["strength"]]))
    shown = capsys.readouterr().out
    assert "Accuracy, %" in shown and "50 % pruned" in shown
    assert (tmp_path / "robustness.png").stat().st_size > 10_000


def test_classes(folder, tmp_path):
    run, data = folder / "classes", folder / "s-001.tar"
    few = [*ZERO_SHOT, "--batch_size", 7, "--num_batches", 1]
    found = measured(folder, tmp_path / "few", run, *FEW, *few, "--data", data)[str(run)]
    trained = results_of(run)
    by_recipe = {(row["kind"], row["strength"]): row for row in trained["robustness"]}
    for row in found:  # of the first 7 images
        assert figures(row) == pytest.approx(figures(by_recipe[row["kind"], row["strength"]]))
    whole = measured(folder, tmp_path / "all", run, *NOTHING, *ZERO_SHOT, "--data", data)
    assert whole[str(run)][0]["accuracy"] == pytest.approx(trained["zero_shot"]["top1"])


def of_transformers(folder):
    """A small CLIPModel with what belongs to it."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    tokens = byte_tokenizer()
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>",
        special_tokens=[("</s>", 1)],  # where the text's features are taken
    )
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.logit_scale.data.fill_(8.0)  # since such small features hardly differ
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    for each in (model, tokens, processor):
        each.save_pretrained(folder)
    return model, tokens, processor


def test_models_of_transformers(folder, tmp_path):
    model, tokens, processor = of_transformers(tmp_path / "hf")
    data = folder / "s-001.tar"
    # As the recipe's test data are: 12 pairs with a class each.
    fields = Fields(label="kind")
    pairs = [pair for pair in open_pairs(str(data), fields)]
    images = [read_image(pair.image) for pair in pairs]
    pixels = processor(images=images, return_tensors="pt").pixel_values

    def encoded(texts):
        how = {"padding": "max_length", "truncation": True, "max_length": 24}
        return tokens(list(texts), return_tensors="pt", **how).input_ids

    run = tmp_path / "hf"
    options = ["--bits", "4", "--group_sizes", "none", *NOTHING[1:], "--batch_size", len(pairs)]
    captions = encoded(pair.caption for pair in pairs)
    with torch.no_grad():
        loss = model(input_ids=captions, pixel_values=pixels, return_loss=True).loss.item()
        with round_to_nearest(model, bits=4):
            rounded = model(input_ids=captions, pixel_values=pixels, return_loss=True).loss.item()
    found = measured(tmp_path, tmp_path / "pairs", run, *options, "--data", data)[str(run)]
    # Logits of 3,000 in float32, and sums in another order.
    assert [row["loss"] for row in found] == pytest.approx([loss, rounded], rel=1e-4)
    assert abs(rounded - loss) > 1e-3 * loss

    labelled = [*ZERO_SHOT, "--class_names", str(tmp_path / "names.json")]
    names = sorted({pair.label for pair in pairs})
    (tmp_path / "names.json").write_text(json.dumps({name: f"the {name}" for name in names}))
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    with torch.no_grad():
        outputs = [
            model(
                input_ids=encoded(
                    template(f"the {name}") for template in SIMPLE_IMAGENET_TEMPLATES
                ),
                pixel_values=pixels,
            )
            for name in names
        ]
        classes = [torch.nn.functional.normalize(o.text_embeds.mean(0), dim=-1) for o in outputs]
        logits = model.logit_scale.exp() * outputs[0].image_embeds @ torch.stack(classes).T
    labels = torch.tensor([names.index(pair.label) for pair in pairs])
    found = measured(tmp_path, tmp_path / "classes", run, *options, *labelled, "--data", data)
    (row, _) = found[str(run)]
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert row["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_merging(folder, tmp_path):
    names = [folder / "pairs", folder / "classes"]
    options = [*FEW, *ZERO_SHOT, "--merge", "--data", folder / "s-001.tar"]
    found = measured(folder, tmp_path, *names, *options)
    loaded = [open_clip.create_model_and_transforms(f"local-dir:{name}") for name in names]
    merged, transform = average([each[0] for each in loaded]).eval(), loaded[0][2]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{names[0]}")
    pairs = list(open_pairs(str(folder / "s-001.tar"), Fields(label="kind")))
    pixels = torch.stack([transform(read_image(pair.image)) for pair in pairs])
    labels = torch.tensor([["even", "odd"].index(pair.label) for pair in pairs])
    templates, classes = open_clip.SIMPLE_IMAGENET_TEMPLATES, ["even", "odd"]
    for row, bits in zip(found["average"], (None, 4), strict=False):
        with torch.no_grad(), round_to_nearest(merged, bits=bits or 16):
            weights = open_clip.build_zero_shot_classifier(merged, tokenizer, classes, templates)
            logits = (
                merged.logit_scale.exp() * merged.encode_image(pixels, normalize=True) @ weights
            )
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        # 16 bits for none: 2^-16 of each weight, on logits of 14.
        assert row["loss"] == pytest.approx(loss, abs=2e-3 if bits is None else 1e-5)
        assert row["accuracy"] == (logits.argmax(dim=1) == labels).double().mean().item()
    assert list(found) == [*map(str, names), "average"]
    assert found["average"][0]["loss"] != found[str(names[0])][0]["loss"]


def test_test_data_stay_unseen_where_they_should(folder, tmp_path):
    options = {"zero_shot_data": folder / "s-001.tar", "label_column": "kind", "test": "false"}
    main(flags(tmp_path, tmp_path / "out", **options, robustness="true", learning_rate=0))
    results = results_of(tmp_path / "out")
    first = results["robustness"][0]["loss"]
    assert first == pytest.approx(results["validation_loss"], rel=1e-5)


def test_open_clip_is_needed_by_its_own_models(folder, tmp_path, monkeypatch):
    there = {"matplotlib", "rich"}
    monkeypatch.setattr("nso_hf.refusal.find_spec", lambda name: name in there or None)
    message = "nso robustness of a CLIP model needs open_clip: run pip install "
    with pytest.raises(MissingPackage, match=re.escape(message + "'nso_hf[clip]'")):
        measured(folder, tmp_path / "out", folder / "pairs", "--data", folder / "s-000.tar")
    assert not (tmp_path / "out").exists()


def test_open_clip_is_not_needed_by_others(tmp_path):
    save_model("gpt2", tmp_path / "gpt2")
    (tmp_path / "texts.jsonl").write_text('{"text": "a text of some length"}\n' * 2)
    program = "import sys; sys.modules['open_clip'] = None; "
    program += "from nso_hf.robustness.__main__ import main; main()"
    data = ["--data", tmp_path / "texts.jsonl", "--output", tmp_path / "out"]
    words = [sys.executable, "-c", program, tmp_path / "gpt2", *NOTHING, *data]
    subprocess.run([*map(str, words)], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "out" / "results.json").exists()

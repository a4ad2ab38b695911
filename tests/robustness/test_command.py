"""`nso robustness` from its command line to its files."""

import json
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM

from nso_hf.refusal import Refusal
from nso_hf.robustness import average, robustness, task_arithmetic
from nso_hf.robustness.__main__ import main
from nso_hf.robustness.report import accuracy_of, described, survival_rows
from nso_hf.robustness.report import loss_of as loss_of_row
from tests.refusals import folder_of_images
from tests.tiny_models import save_model

FEW = ["--bits", "4", "--noise", "--relative_noise", "0.1", "--sparsity", "0.5"]
NOTHING = ["--bits", "--noise", "--relative_noise", "--sparsity"]


@pytest.fixture
def folder(tmp_path):
    """Two llamas that differ, what they began with, and texts."""
    for number, name in enumerate(["base", "one", "two"]):
        save_model("llama", tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * number * torch.randn_like(p)
        model.save_pretrained(tmp_path / name)
    texts = [f"the number {i} comes after {i - 1}" + " and so on" * (i % 3) for i in range(10)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    return tmp_path


def measured(folder, *words):
    main([*words, "--data", str(folder / "texts.jsonl"), "--output", str(folder / "out")])
    return json.loads((folder / "out" / "results.json").read_text())["checkpoints"]


def loss_of(model, folder):
    """By the texts one at a time, which need no padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lines = (folder / "texts.jsonl").read_text().splitlines()
    batches = []
    for line in lines:
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        batches.append({"input_ids": ids, "labels": ids})
    options = dict.fromkeys(("bits", "noise", "relative_noise", "sparsity"), ())
    return robustness(model, batches, **options)[0].loss


def test_table_file_and_picture(folder, capsys):
    one, two = str(folder / "one"), str(folder / "two")
    found = measured(folder, one, two, *FEW, "--num_samples", "2", "--group_sizes", "none", "8")
    assert list(found) == [one, two]
    kinds = ["none", "bits", "bits in groups of 8", "relative noise", "sparsity"]
    assert [row["kind"] for row in found[one]] == kinds
    for name in (one, two):
        model = AutoModelForCausalLM.from_pretrained(name)
        # Padded texts in batches, against one after another.
        assert found[name][0]["loss"] == pytest.approx(loss_of(model, folder), rel=1e-5)
    out = capsys.readouterr().out
    for words in ("Loss ± standard error", "Accuracy, %", "4 bits", "50 % pruned", "as it is"):
        assert words in out
    assert (folder / "out" / "robustness.png").stat().st_size > 10_000


def test_merging(folder):
    names = [str(folder / name) for name in ("one", "two")]
    base = str(folder / "base")
    found = measured(folder, *names, *NOTHING, "--merge", "--base", base, "--scales", "0.4")
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    merged = {
        "average": average(models),
        "base + 0.4 sum of changes": task_arithmetic(
            AutoModelForCausalLM.from_pretrained(base), models, scale=0.4
        ),
    }
    assert list(found) == [*names, *merged]
    for name, model in merged.items():
        assert found[name][0]["loss"] == pytest.approx(loss_of(model, folder), rel=1e-5)


def test_adapters_are_merged_first(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    adapted.save_pretrained(folder / "adapter")
    where = ["--tokenizer", str(folder / "base")]
    found = measured(folder, str(folder / "adapter"), *FEW, *where, "--num_samples", "1")
    rows = next(iter(found.values()))
    merged = adapted.merge_and_unload()
    assert rows[0]["loss"] == pytest.approx(loss_of(merged, folder), rel=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize("command", ["robustness", "curvature"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_classifiers_of_images_are_measured(tmp_path, kind, command):
    """Those of the recipe, of which networks of convolutions have no embeddings."""
    from nso_hf.curvature.__main__ import main as measure_curvature
    from nso_hf.tasks.images.classifier_options import ClassifierOptions

    options = ClassifierOptions(kind)
    pixels = options.pixels("digits")
    options.load(["dark", "light"], pixels).save_pretrained(tmp_path / kind)
    pixels.write(tmp_path / kind)
    folder_of_images(tmp_path / "images", {"train": 2, "test": 2})
    words = [str(tmp_path / kind), "--data", str(tmp_path / "images"), "--num_samples", "2"]
    words += ["--output", str(tmp_path / "out")]
    if command == "robustness":
        main([*words, *NOTHING])
    else:
        few = ["--num_eigenvalues", "1", "--spectrum_steps", "0", "--slice_points", "0"]
        measure_curvature([*words, *few])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["checkpoints"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_is_broken_is_named(tmp_path, split):
    from nso_hf.tasks.images.classifier_options import ClassifierOptions

    options = ClassifierOptions("cnn")
    pixels = options.pixels("digits")
    options.load(["dark", "light"], pixels).save_pretrained(tmp_path / "cnn")
    pixels.write(tmp_path / "cnn")
    folder_of_images(tmp_path / "images", {"train": 2, "test": 2})
    (tmp_path / "images" / split / "light" / "0.png").write_bytes(b"no image")
    words = [str(tmp_path / "cnn"), "--data", str(tmp_path / "images"), "--split", split]
    with pytest.raises(Refusal, match=r"data='.*images': row 3 cannot be read \("):
        main([*words, "--output", str(tmp_path / "out"), *NOTHING])
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("written", [loss_of_row, accuracy_of])
def test_a_recipe_shows_a_row_for_each_change(written):
    model, batch = Model(), {"x": torch.eye(3), "labels": torch.arange(3)}
    rows = robustness(model, [batch], bits=(4, 2), noise=(0.1,), relative_noise=(), sparsity=(0.5,))
    as_results = [asdict(row) for row in rows]
    shown = list(survival_rows([None, as_results, as_results], written))
    assert [title.strip() for title, _ in shown] == [described(row) for row in rows]
    assert [cells for _, cells in shown] == [["", written(row), written(row)] for row in rows]
    assert list(survival_rows([None, None], written)) == []


@pytest.mark.parametrize("length", [5, 60, 150])
@pytest.mark.parametrize("panels", [1, 3])
def test_the_legend_is_whole(tmp_path, monkeypatch, length, panels):
    """However long the names of checkpoints are."""
    from matplotlib.figure import Figure

    from nso_hf.robustness.report import plot_rows

    strengths = {"bits": (4,), "noise": (), "relative_noise": (), "sparsity": ()}
    if panels == 3:
        strengths |= {"noise": (0.1,), "sparsity": (0.5,)}
    batch = {"x": torch.eye(3), "labels": torch.arange(3)}
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **o: (save(f, *a, **o), drawn.append(f)))
    rows = robustness(Model(), [batch], **strengths)
    plot_rows({"a" * length: rows, "b" * length: rows}, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        width = picture.width
    drawn[0].set_dpi(120)  # that of the file: glyphs do not scale exactly
    drawn[0].canvas.draw()
    assert width >= drawn[0].legends[0].get_window_extent().width


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_what_was_done_is_said():
    from nso_hf.robustness import Row

    rest = {"loss": 1.0, "stderr": 0.1, "accuracy": None, "accuracy_stderr": None, "ece": None}
    rows = [
        Row(kind="none", strength=None, **rest),
        Row(kind="bits in groups of 64", strength=3, **rest),
        Row(kind="relative noise", strength=0.1, **rest),
        Row(kind="sparsity", strength=0.7, **rest),
    ]
    said = ["as it is", "3 bits in groups of 64", "relative noise 0.1", "70 % pruned"]
    assert [described(row) for row in rows] == said


def test_a_checkpoint_that_a_package_carries(folder, monkeypatch):
    (folder / "packed").mkdir()
    (folder / "packed" / "__init__.py").write_text("import what_is_not_there")  # never imported
    (folder / "one").rename(folder / "packed" / "model")
    monkeypatch.syspath_prepend(folder)
    rows = measured(folder, "package:packed/model", *NOTHING)
    loss = loss_of(AutoModelForCausalLM.from_pretrained(folder / "packed" / "model"), folder)
    assert rows["package:packed/model"][0]["loss"] == pytest.approx(loss, rel=1e-5)

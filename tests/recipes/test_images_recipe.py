"""The recipe of image classifiers from its command line to its files, on tiny models."""

import json
from pathlib import Path

import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from nso_hf.curvature.__main__ import main as measure_curvature
from nso_hf.robustness import robustness
from nso_hf.running.sampling import places
from nso_hf.tasks.classification.evaluation import figures
from nso_hf.tasks.images import sources
from nso_hf.tasks.images.classifier_options import ClassifierOptions
from nso_hf.tasks.images.dataset import Pixels
from nso_hf.tasks.images.reading import read_image
from recipes.image_classification import OPTIONS, main
from tests.distributed.launch import torchrun
from tests.refusals import folder_of_images, idx_files, saved_images

ROOT = Path(__file__).parents[2]
EFFICIENTNET = ROOT.parent / "shared" / "models" / "efficientnet-lite0"
SMALL = json.dumps({"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1})


def flags(output, **options):
    base = {
        "output_dir": output,
        "model_kwargs": SMALL,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "max_steps": 4,
        "logging_steps": 1,
        "train_size": 200,
        "save_strategy": "no",
        "seed": 3,
    }
    words = []
    for name, value in (base | options).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words]


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_end_to_end(tmp_path, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 2, "label_noise": 0.3}
    main(flags(tmp_path, **options, curvature="true", curvature_samples=3))
    results = results_of(tmp_path)
    assert results["steps"] == 4 and results["training_examples"] == 200
    assert results["classes"] == [str(i) for i in range(10)]
    evaluated = [e for e in results["log"] if "eval_accuracy" in e]
    assert [e["step"] for e in evaluated] == [2, 4]
    # 1,437 images to train on, a tenth of them held out; every fifth of 1,797 is a test image.
    assert results["validation"]["examples"] == 144 and results["test"]["examples"] == 360
    validation = results["validation"]
    assert validation["peak_accuracy"] == max(e["eval_accuracy"] for e in evaluated)
    assert validation["accuracy"] == evaluated[-1]["eval_accuracy"]
    # The Trainer's is a mean over batches in float32.
    assert validation["loss"] == pytest.approx(evaluated[-1]["eval_loss"], rel=1e-5)
    wrong = results["memorised"]
    assert 30 < wrong["examples"] < 90  # 60 +- 6.5
    assert set(results["curvature"]) >= {"trace", "trace_stderr", "lambda_max"}
    assert all(e["nso/perturbation_norm"] > 0 for e in results["log"] if "loss" in e)
    shown = capsys.readouterr().out
    for words in ("200 training examples", "test, 360 examples", "memorised, %", "trace of the"):
        assert words in shown
    for name in ("training.png", "calibration.png"):
        assert read_image(tmp_path / name).size[0] > 400


def test_what_is_saved_is_what_was_judged(tmp_path):
    """transformers' own classes, given the images, find the accuracy and loss of results.json."""
    main(flags(tmp_path))
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    images = sources.open_images("digits", "test", Pixels(8, 3, (0.5,) * 3, (0.5,) * 3))
    inputs = processor([images.image(i) for i in range(360)], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    found = figures(logits, torch.tensor([int(label) for label in images.labels]))
    expected = results_of(tmp_path)["test"]
    assert found["accuracy"] == expected["accuracy"]
    # The same products in batches of other sizes, in float32.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_curvature_of_what_is_saved(tmp_path):
    main(flags(tmp_path / "out"))
    images = sources.open_images("digits", "train", Pixels(8, 3, (0.5,) * 3, (0.5,) * 3))
    rows = {"image": [], "label": images.labels[:16]}
    for number in range(16):
        rows["image"].append(f"{number}.png")
        images.image(number).save(tmp_path / f"{number}.png")
    Dataset.from_dict(rows).to_json(tmp_path / "data.jsonl")
    options = ["--data", str(tmp_path / "data.jsonl"), "--num_samples", "2", "--batch_size", "16"]
    measure_curvature([str(tmp_path / "out"), *options, "--output", str(tmp_path / "measured")])
    batch = {
        "pixel_values": images.batch(range(16)),
        "labels": torch.tensor([int(label) for label in images.labels[:16]]),
    }
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        loss = model(**batch).loss.item()
    measured = json.loads((tmp_path / "measured" / "results.json").read_text())
    (found,) = measured["checkpoints"].values()
    assert found["stability"]["loss"] == pytest.approx(loss, rel=1e-5)  # in float32


def test_images_without_a_class_are_counted(tmp_path, capsys):
    saved_images(train=["a", "b", None, "a", "b"], test=["a", None, "b"])(tmp_path)
    options = {"data": tmp_path / "data", "validation_size": 0, "train_size": None, "max_steps": 1}
    main(flags(tmp_path / "out", **options, image_size=8))
    said = capsys.readouterr().out
    assert "4 training images" in said and "2 test images; 2 without a class left out" in said


def test_test_images_are_not_read_without_being_asked_for(tmp_path, monkeypatch):
    original, opened = sources.open_images, []

    def watched(data, split, *args, **kwargs):
        opened.append(split)
        assert split == "train"
        return original(data, split, *args, **kwargs)

    monkeypatch.setattr(sources, "open_images", watched)
    main(flags(tmp_path / "without", test="false"))
    assert opened == ["train"]
    monkeypatch.undo()
    main(flags(tmp_path / "with"))
    without, whole = results_of(tmp_path / "without"), results_of(tmp_path / "with")
    assert "test" not in without and whole["test"]["examples"] == 360
    assert without["validation"] == whole["validation"]


@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_resume_is_the_uninterrupted_run(tmp_path, interrupt_at, model):
    """In the middle of the second pass, with augmentation and mixtures drawn anew."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "label_noise": 0.2}
    options |= {"augmentation": ["crop", "trivial"], "mixup": "true"}
    options |= {"model_name_or_path": model, "ema_decay": 0.9}
    options |= {} if model == "vit" else {"model_kwargs": None}
    main(flags(tmp_path / "whole", **options))
    part = flags(tmp_path / "part", **options)
    message = r"Interrupted at step 7; .*checkpoint-4.*goes on"
    with interrupt_at(7), pytest.raises(SystemExit, match=message):
        main(part)
    main([*part, "--resume_from_checkpoint", "last"])
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    for split in ("validation", "test", "memorised"):
        assert whole[split] == part[split]
    # Of both parts: that up to the checkpoint is recorded beside it.
    recorded = json.loads((tmp_path / "part" / "options.json").read_text())["seconds"]
    assert part["train_seconds"] > recorded["4"] > 0
    assert part["train_seconds"] >= recorded["9"]


def test_a_training_that_was_done_keeps_its_method(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "sigma": 0.01}
    main(flags(tmp_path, **options))
    before = results_of(tmp_path)
    again = options | {"resume_from_checkpoint": "last"}
    message = r"sigma=0.02: step 2 was the last, with 0.01: none is left to train"
    with pytest.raises(ValueError, match=message):
        main(flags(tmp_path, **(again | {"sigma": 0.02})))
    main(flags(tmp_path, **again))
    after = results_of(tmp_path)
    recorded = json.loads((tmp_path / "options.json").read_text())["seconds"]
    assert after["train_seconds"] >= recorded["2"] > 0
    assert after["test"] == before["test"]


def test_going_on_with_something_else(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    main(flags(tmp_path, **options))
    options |= {"resume_from_checkpoint": "last", "max_steps": 3}
    for message, changed in {
        "label_noise=0.5: this run began with 0.0": {"label_noise": 0.5},
        r"augmentation=\['flip'\]: this run began with": {"augmentation": "flip"},
        "mixup=True: this run began with False; it would go on with another": {"mixup": "true"},
    }.items():
        with pytest.raises(ValueError, match=message):
            main(flags(tmp_path, **(options | changed)))
    main(flags(tmp_path, **options, test="false"))
    assert results_of(tmp_path)["steps"] == 3


def test_beside_plain_training(tmp_path, capsys):
    """Which is that of a run of its own at sigma 0."""
    options = {"label_noise": 0.4, "sigma": 0.05}
    main(flags(tmp_path / "both", **options, compare_plain="true"))
    shown = capsys.readouterr().out
    main(flags(tmp_path / "alone", **(options | {"sigma": 0})))
    both, alone = results_of(tmp_path / "both"), results_of(tmp_path / "alone")
    for split in ("validation", "test", "memorised"):
        assert both["plain"][split] == alone[split]
    assert both["test"]["loss"] != alone["test"]["loss"]
    header = next(line for line in shown.splitlines() if "plain" in line and "NSO" in line)
    assert header.index("NSO") < header.index("plain")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_linear_probe_changes_the_head_alone(tmp_path):
    """Statistics of BatchNorm too are as they were, the average's among them."""
    model = {"model_name_or_path": "cnn", "model_kwargs": None}
    main(flags(tmp_path / "before", **model, max_steps=1))
    model["model_name_or_path"] = tmp_path / "before"
    options = {"linear_probe": "true", "ema_decay": 0.5, "learning_rate": 0.1}
    main(flags(tmp_path / "after", **model, **options))
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "after")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}


def test_a_linear_probe_is_logistic_regression(tmp_path):
    """One step of gradient descent on the head equals that on its features, in plain PyTorch."""
    model = {"model_name_or_path": "cnn", "model_kwargs": None}
    main(flags(tmp_path / "before", **model, max_steps=1))
    model["model_name_or_path"] = tmp_path / "before"
    descent = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    descent |= {"max_grad_norm": 0, "weight_decay": 0, "sigma": 0, "max_steps": 1}
    descent |= {"per_device_train_batch_size": 200}
    main(flags(tmp_path / "after", **model, **descent, linear_probe="true"))
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "before").eval()
    train = results_of(tmp_path / "after")
    assert train["training_examples"] == 200
    batch = training_batch(seed=3, size=200)
    head = classifier.classifier[1].requires_grad_(True)
    classifier(**batch).loss.backward()
    after = weights_of(tmp_path / "after")
    for name in ("weight", "bias"):
        parameter = getattr(head, name)
        expected = parameter - 0.1 * parameter.grad
        # 200 examples summed in another order, in float32.
        torch.testing.assert_close(after[f"classifier.1.{name}"], expected, rtol=1e-4, atol=1e-6)


def training_batch(seed, size):
    """The digits that `--train_size` leaves, in any order."""
    from nso_hf.tasks.classification.options import ProtocolOptions

    images = sources.open_images("digits", "train", Pixels(8, 3, (0.5,) * 3, (0.5,) * 3))
    labels = [int(label) for label in images.labels]
    names = [str(i) for i in range(10)]
    split = ProtocolOptions(train_size=size).split(labels, names, seed, has_test=True)
    return {"pixel_values": images.batch(split.train), "labels": split.labels}


def test_a_new_head_for_other_classes(tmp_path):
    """On the weights that there are; the same classes keep their head."""
    folder_of_images(tmp_path / "data", {"train": 6, "test": 3})
    options = {"data": tmp_path / "data", "train_size": None, "validation_size": 0}
    options |= {"model_kwargs": None, "max_steps": 1, "learning_rate": 0}
    main(flags(tmp_path / "first"))
    main(flags(tmp_path / "second", **options, model_name_or_path=tmp_path / "first"))
    main(flags(tmp_path / "third", **options, model_name_or_path=tmp_path / "second"))
    first, second, third = (weights_of(tmp_path / run) for run in ("first", "second", "third"))
    assert all(torch.equal(first[n], second[n]) for n in first if not n.startswith("classifier"))
    assert second["classifier.weight"].shape == (2, 16)
    assert all(torch.equal(second[name], third[name]) for name in second)
    results = results_of(tmp_path / "second")
    assert results["classes"] == ["dark", "light"] and results["test"]["examples"] == 6
    assert "validation" not in results


def test_held_out_test_images(tmp_path):
    folder_of_images(tmp_path / "data", {"train": 20})
    options = {"data": tmp_path / "data", "train_size": None, "image_size": 8, "test_size": 0.25}
    main(flags(tmp_path / "out", **options, test_split="none", learning_rate=1e-2, max_steps=10))
    results = results_of(tmp_path / "out")
    assert (results["training_examples"], results["validation"]["examples"]) == (27, 3)
    assert results["test"]["examples"] == 10 and results["test"]["accuracy"] == 1  # black and white


def test_classes_have_the_numbers_of_the_data_set(tmp_path):
    idx_files(tmp_path / "data", 60)
    options = {"data": "fashion_mnist", "fashion_mnist_folder": tmp_path / "data"}
    main(flags(tmp_path / "out", **options, train_size=None, examples_per_class=2, max_steps=1))
    results = results_of(tmp_path / "out")
    assert results["classes"][0] == "T-shirt/top" and results["classes"][9] == "ankle boot"
    assert results["training_examples"] == 20


@pytest.mark.slow
def test_the_emoji(tmp_path):
    options = {"data": "openmoji", "image_size": 16, "train_size": None}
    main(flags(tmp_path, **options, augmentation=["resized_crop", "flip"], max_steps=2))
    results = results_of(tmp_path)
    assert "face" in results["classes"] and results["training_examples"] > 500


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sam", "swa_start": 0.5, "l2_sp": 0.01},
        {"method": "nso", "sign": "alternate", "gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        | {"load_best_model_at_end": "true", "metric_for_best_model": "accuracy"}
        | {"early_stopping_patience": 1, "label_smoothing_factor": 0.1, "weight_decay": 0.1},
    ],
    ids=["sam, swa, l2-sp", "alternate", "early stopping"],
)
def test_what_goes_along(tmp_path, options):
    main(flags(tmp_path, **options, model_name_or_path="cnn", model_kwargs=None))
    assert results_of(tmp_path)["test"]["examples"] == 360


def test_what_survives_is_measured_on_the_test_images(tmp_path):
    """As by the function, on the folder that was written."""
    main(flags(tmp_path, robustness="true", robustness_examples=100))
    rows = {(r["kind"], r["strength"]): r for r in results_of(tmp_path)["robustness"]}
    pixels = ClassifierOptions().pixels("digits")
    images = sources.open_images("digits", "test", pixels, label_column="label")
    chosen = places(100, len(images))
    batch = {
        "pixel_values": torch.stack([images[i]["pixel_values"] for i in chosen]),
        "labels": torch.tensor([int(images.labels[i]) for i in chosen]),
    }
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    nothing = dict.fromkeys(("noise", "relative_noise", "sparsity"), ())
    for row in robustness(model, [batch], bits=(4, 2), group_sizes=(None,), **nothing):
        found = rows[row.kind, row.strength]
        assert found["loss"] == pytest.approx(row.loss, rel=1e-5)
        assert found["accuracy"] == row.accuracy
    assert rows["bits", 2]["loss"] != rows["none", None]["loss"]


def test_early_stopping(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": "true", "metric_for_best_model": "accuracy"}
    options |= {"early_stopping_patience": 2, "learning_rate": 1e-9, "max_steps": 50}
    main(flags(tmp_path, **options))
    assert results_of(tmp_path)["steps"] == 3  # never better than the first time


def test_timm_without_weights(tmp_path):
    model = {"model_name_or_path": "timm/test_resnet.r160_in1k", "pretrained": "false"}
    options = {"image_size": 32, "model_kwargs": None, "max_steps": 1, "train_size": 40}
    main(flags(tmp_path / "out", **model, **options))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 10 and model.config.id2label[3] == "3"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    seen = processor(image)["pixel_values"][0]
    stored = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    expected = Pixels(32, 3, stored.mean, stored.std).of(image)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)  # the same, in another order
    assert processor(Image.new("RGB", (50, 40)))["pixel_values"].shape == (1, 3, 32, 32)
    again = {"model_name_or_path": tmp_path / "out", "learning_rate": 0, "max_steps": 1}
    main(flags(tmp_path / "again", **again, model_kwargs=None, train_size=40))
    # BatchNorm's statistics alone have moved.
    a, b = weights_of(tmp_path / "out"), weights_of(tmp_path / "again")
    assert a["timm_model.fc.weight"].shape[0] == 10
    assert all(
        torch.equal(a[name], b[name]) for name in a if "running" not in name and "num_" not in name
    )


@pytest.mark.skipif(not EFFICIENTNET.exists(), reason="needs ../shared/models/efficientnet-lite0")
def test_a_pretrained_network(tmp_path):
    options = {"model_name_or_path": EFFICIENTNET, "model_kwargs": None, "image_size": 32}
    options |= {"train_size": None, "examples_per_class": 2, "validation_size": 20}
    main(flags(tmp_path, **options, test="false", max_steps=1, per_device_train_batch_size=8))
    results = results_of(tmp_path)
    assert results["training_examples"] == 20 and results["validation"]["examples"] == 20
    before, after = (load_file(f / "model.safetensors") for f in (EFFICIENTNET, tmp_path))
    assert before.keys() == after.keys()
    assert after["classifier.weight"].shape == (10, 1280)


@pytest.mark.distributed
def test_torchrun_with_two_processes(tmp_path):
    recipe = str(ROOT / "recipes" / "image_classification.py")
    torchrun([recipe, *flags(tmp_path, label_noise=0.2, eval_strategy="epoch")], timeout=180)
    results = results_of(tmp_path)
    assert results["processes"] == 2 and results["backend"] == "DistributedDataParallel"
    assert results["test"]["examples"] == 360


def test_the_shipped_config_is_valid(monkeypatch):
    from nso_hf.running.command_line import RecipeParser

    monkeypatch.chdir(ROOT)
    config = str(ROOT / "recipes" / "configs" / "demo_images.yaml")
    parser = RecipeParser(OPTIONS, configs=ROOT / "recipes" / "configs")
    *_, args = parser.parse(["--config", config, "--use_cpu", "true"])
    assert args.sigma > 0 and parser._named_configs() == ["demo_images"]

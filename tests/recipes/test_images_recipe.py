"""The recipe of image classification from its command line to its files, on small models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification

from nso_hf.robustness import robustness
from nso_hf.running.command_line import RecipeParser
from nso_hf.tasks.images.options import ColumnOptions
from recipes.image_classification import OPTIONS, main
from tests.distributed.launch import torchrun
from tests.refusals import folder_of_images

ROOT = Path(__file__).parents[2]
EFFICIENTNET = ROOT.parent / "shared" / "models" / "efficientnet-lite0"


def flags(output, **options):
    base = {
        "data": "digits",
        "model_name_or_path": "cnn",
        "output_dir": output,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "max_steps": 4,
        "logging_steps": 1,
        "sigma": 0.01,
        "seed": 3,
    }
    words = []
    for name, value in {**base, **options}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_end_to_end(tmp_path, capsys):
    options = {"label_noise": 0.4, "validation_size": 200, "robustness": "true"}
    options |= {"eval_strategy": "steps", "eval_steps": 20, "curvature": "true", "max_steps": 60}
    options |= {"curvature_samples": 2, "learning_rate": 3e-3}
    main(flags(tmp_path, **options))
    results, shown = results_of(tmp_path), capsys.readouterr().out
    assert results["steps"] == 60 and results["training_examples"] == 1437 - 200
    assert results["classes"] == [str(digit) for digit in range(10)]
    assert results["test"]["examples"] == 360 and results["validation"]["examples"] == 200
    # 1,237 labels, each wrong with probability 0.4: five standard deviations.
    wrong = results["memorised"]["examples"]
    assert abs(wrong - 0.4 * 1237) < 5 * (0.4 * 0.6 * 1237) ** 0.5
    assert results["test"]["accuracy"] > 0.5  # chance is 0.1 +- 0.016
    logged = [e["eval_accuracy"] for e in results["log"] if "eval_accuracy" in e]
    assert results["validation"]["peak_accuracy"] == max(logged) and len(logged) == 3
    assert results["validation"]["accuracy"] == pytest.approx(logged[-1])
    assert results["curvature"]["trace"] != 0
    assert all(e["nso/perturbation_norm"] > 0 for e in results["log"] if "loss" in e)
    for words in ("360 examples", "memorised, %", "calibration"):
        assert words in shown
    assert (tmp_path / "training.png").exists() and (tmp_path / "calibration.png").exists()
    # What was measured is what the folder does, read as transformers reads it.
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "7"
    digits = load_digits()
    test = [i for i in range(len(digits.target)) if i % 5 == 0]
    images = [digits.images[i] * 255 / 16 for i in test]
    pixels = processor(
        [image.round().astype("uint8")[None] for image in images],
        return_tensors="pt",
        input_data_format="channels_first",
    )["pixel_values"]
    labels = torch.tensor(digits.target[test])
    with torch.no_grad():
        right = (model(pixel_values=pixels).logits.argmax(1) == labels).double().mean().item()
    assert results["test"]["accuracy"] == pytest.approx(right)
    rows = {(r["kind"], r["strength"]): r for r in results["robustness"]}
    assert rows["none", None]["accuracy"] == pytest.approx(right)
    (expected,) = robustness(
        model,
        [{"pixel_values": pixels, "labels": labels}],
        **{"noise": (), "relative_noise": (), "sparsity": (), "bits": ()},
    )
    assert rows["none", None]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert rows["bits", 2]["loss"] != rows["none", None]["loss"]


def test_without_the_test_images(tmp_path, monkeypatch):
    """They are not even opened."""
    opened, original = [], ColumnOptions.open

    def watched(self, option, pixels, *, split="train_split", labelled):
        opened.append(split)
        return original(self, option, pixels, split=split, labelled=labelled)

    monkeypatch.setattr(ColumnOptions, "open", watched)
    main(flags(tmp_path / "without", test="false", max_steps=1))
    assert opened == ["train_split"] and "test" not in results_of(tmp_path / "without")
    main(flags(tmp_path / "with", max_steps=1))
    assert opened[1:] == ["train_split", "test_split"]


def test_resume_is_the_uninterrupted_run(tmp_path, interrupt_at):
    """With images that are changed anew in each pass, in the second of them."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "label_noise": 0.2}
    options |= {"per_device_train_batch_size": 256, "augmentation": ["crop", "flip"]}
    main(flags(tmp_path / "whole", **options))
    part = flags(tmp_path / "part", **options)
    message = r"Interrupted at step 7; .*checkpoint-4.*goes on"
    with interrupt_at(7), pytest.raises(SystemExit, match=message):
        main(part)
    main([*part, "--resume_from_checkpoint", "last"])
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    assert whole["test"] == part["test"] and whole["memorised"] == part["memorised"]
    plain = flags(tmp_path / "plain", **(options | {"augmentation": ["none"]}))
    main(plain)
    other = load_file(tmp_path / "plain" / "model.safetensors")
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_few_examples_and_a_linear_probe(tmp_path):
    main(flags(tmp_path / "whole", model_name_or_path="vit", max_steps=2))
    base = load_file(tmp_path / "whole" / "model.safetensors")
    options = {"model_name_or_path": tmp_path / "whole", "linear_probe": "true"}
    main(flags(tmp_path / "probe", **options, examples_per_class=3, max_steps=3))
    results = results_of(tmp_path / "probe")
    assert results["training_examples"] == 30
    probed = load_file(tmp_path / "probe" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], probed[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_companions(tmp_path):
    """Mixup during training, and an average at its end: evaluation is of the average."""
    options = {"mixup": "true", "mixup_alpha": 0.4, "max_steps": 3, "learning_rate": 1e-2}
    main(flags(tmp_path / "ema", **options, ema_decay=0.9))
    main(flags(tmp_path / "last", **options))
    ema, last = (load_file(tmp_path / run / "model.safetensors") for run in ("ema", "last"))
    assert any(not torch.equal(ema[name], last[name]) for name in ema)
    assert results_of(tmp_path / "ema")["companion_options"]["ema_decay"] == 0.9


def test_early_stopping(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": "true", "metric_for_best_model": "accuracy"}
    options |= {"early_stopping_patience": 2, "learning_rate": 1e-9, "max_steps": 50}
    main(flags(tmp_path, **options))
    assert results_of(tmp_path)["steps"] == 3  # never better than the first time


def test_a_folder_for_each_class(tmp_path):
    folder_of_images(tmp_path / "data", {"train": 8, "test": 3})
    options = {"data": tmp_path / "data", "image_size": 16, "validation_size": 0.25}
    options |= {"per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 1e-2}
    main(flags(tmp_path / "out", **options))
    results = results_of(tmp_path / "out")
    assert results["classes"] == ["dark", "light"] and results["training_examples"] == 12
    assert results["test"]["accuracy"] == 1.0  # black and white


def test_a_model_of_timm(tmp_path):
    pytest.importorskip("timm")
    options = {"model_name_or_path": "timm/resnet10t", "pretrained": "false", "image_size": 32}
    main(flags(tmp_path, **options, examples_per_class=4, max_steps=1))
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 10


def test_plain_training_beside_it(tmp_path, capsys):
    main(flags(tmp_path, compare_plain="true", examples_per_class=4, sigma=0.05))
    results = results_of(tmp_path)
    assert results["plain"]["nso_options"]["sigma"] == 0.0
    assert results["plain"]["test"] != results["test"]
    assert (tmp_path / "plain" / "model.safetensors").exists()
    assert "plain" in capsys.readouterr().out


@pytest.mark.skipif(not EFFICIENTNET.is_dir(), reason="there are no weights of EfficientNet here")
def test_a_pretrained_network(tmp_path):
    options = {"model_name_or_path": EFFICIENTNET, "image_size": 32, "examples_per_class": 2}
    main(flags(tmp_path, **options, max_steps=1, per_device_train_batch_size=4, test="false"))
    assert results_of(tmp_path)["training_examples"] == 20


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    """The digits are told apart as by one process, from the same weights with the same batches."""
    recipe = str(ROOT / "recipes" / "image_classification.py")
    options = {"model_name_or_path": "vit", "max_steps": 5, "label_noise": 0.3, "optim": "sgd"}
    options |= {"learning_rate": 0.1, "sigma": 0.02}
    two = flags(tmp_path / "two", **options, per_device_train_batch_size=16)
    torchrun([recipe, *two], timeout=180)
    main(flags(tmp_path / "one", **options, per_device_train_batch_size=32))
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert two["processes"] == 2 and two["backend"] == "DistributedDataParallel"
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    for name in a:
        # Sums of gradients in another order, five steps: some units in the last place of each.
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], rel=1e-4)
    assert one["memorised"]["examples"] == two["memorised"]["examples"]


def test_the_shipped_config_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = str(ROOT / "recipes" / "configs" / "demo_images.yaml")
    parser = RecipeParser(OPTIONS, configs=ROOT / "recipes" / "configs")
    *_, args = parser.parse(["--config", config, "--use_cpu", "true"])
    assert args.sigma > 0
    assert "demo_images" in parser._named_configs()

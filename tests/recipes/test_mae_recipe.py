"""The recipe of masked autoencoders from its command line to its files, on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from nso_hf.tasks.images.models import load_autoencoder
from nso_hf.tasks.images.reading import read_image
from recipes.mae_pretraining import OPTIONS, main
from tests.distributed.launch import torchrun
from tests.reference import largest_difference
from tests.refusals import SMALL_MAE, folder_of_images, idx_files

ROOT = Path(__file__).parents[2]


def flags(output, **options):
    base = {
        "train_data": "digits",
        "target_data": "digits",
        "output_dir": output,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "max_steps": 4,
        "logging_steps": 1,
        "sigma": 0.01,
        "rademacher_strength": 0.1,
        "per_device_train_batch_size": 16,
        "examples_per_class": 3,
        "seed": 3,
        **SMALL_MAE,
    }
    named = {**base, **options}.items()
    return [str(word) for name, value in named for word in (f"--{name}", value)]


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_end_to_end(tmp_path, capsys):
    main(flags(tmp_path, validation_size=40, eval_strategy="steps", eval_steps=2))
    results = results_of(tmp_path)
    assert results["steps"] == 4 and results["training_images"] == 1437 - 40
    training = [entry for entry in results["log"] if "loss" in entry]
    for entry in training:
        assert entry["nso/perturbation_norm"] > 0 and entry["rademacher/complexity"] > 0
    assert len([entry for entry in results["log"] if "eval_loss" in entry]) == 2
    assert results["labelled_images"] == 30
    for name in ("before pretraining", "pretrained"):
        found = results["evaluation"][name]
        assert found["images"] == 360 and found["classes"] == 10 and found["chance"] == 0.1
        counts = [c["images"] for c in found["per_class"].values()]
        assert sum(counts) == 360 and max(counts) == pytest.approx(360 * found["majority"])
    assert read_image(tmp_path / "mae.png").size[0] > 500
    assert (tmp_path / "training.png").exists()
    shown = capsys.readouterr().out
    for words in ("linear probe, 30 labelled images", "before pretraining", "chance, 10 classes"):
        assert words in shown
    # A folder of transformers', which the recipe begins with as well.
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    assert type(model).__module__.startswith("transformers.")
    assert largest_difference(model, ours) == 0
    sizes = dict.fromkeys(SMALL_MAE)
    again = flags(tmp_path / "again", max_steps=1, learning_rate=0, model_name_or_path=tmp_path)
    pairs = zip(again[::2], again[1::2], strict=True)
    main([w for flag, value in pairs if flag[2:] not in sizes for w in (flag, value)])
    evaluation = results_of(tmp_path / "again")["evaluation"]
    assert evaluation["before pretraining"] == results["evaluation"]["pretrained"]
    assert evaluation["pretrained"] == results["evaluation"]["pretrained"]


@pytest.mark.slow
def test_fine_tuning(tmp_path):
    """All weights: the digits are told apart better than by chance after some passes."""
    options = {"evaluation": "fine_tune", "fine_tune_epochs": 10, "examples_per_class": 20}
    main(flags(tmp_path, **options, fine_tune_learning_rate=1e-2, max_steps=1))
    evaluation = results_of(tmp_path)["evaluation"]
    assert all(found["top1"] > 0.3 for found in evaluation.values())  # chance .1 +- .016
    assert not list((tmp_path / "fine_tuned").glob("checkpoint-*"))


def test_resume_is_the_uninterrupted_run(tmp_path, interrupt_at):
    """In the second pass over the images, in the middle of which a checkpoint is."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    options |= {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 1}
    main(flags(tmp_path / "whole", **options))
    part = flags(tmp_path / "part", **options)
    message = r"Interrupted at step 7; .*checkpoint-4.*goes on"
    with interrupt_at(7), pytest.raises(SystemExit, match=message):
        main(part)
    main([*part, "--resume_from_checkpoint", "last"])
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    assert whole["evaluation"] == part["evaluation"]


def test_going_on_with_something_else(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    main(flags(tmp_path, **options))
    options |= {"resume_from_checkpoint": "last", "max_steps": 3}
    for message, changed in {
        "rademacher_strength=0.2: this run began with 0.1": {"rademacher_strength": 0.2},
        "mask_ratio=0.5: this run began with 0.75": {"mask_ratio": 0.5},
        "train_data='openmoji': this run began with 'digits'": {"train_data": "openmoji"},
    }.items():
        with pytest.raises(ValueError, match=message):
            main(flags(tmp_path, **(options | changed)))
    main(flags(tmp_path, **(options | {"evaluation": "none", "sigma": 0.02})))
    assert results_of(tmp_path)["steps"] == 3


def test_folders_of_images(tmp_path):
    """A folder for each class in a folder for each split; pretraining needs no classes."""
    folder_of_images(tmp_path / "target", {"train": 6, "test": 3})
    for number in range(20):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 12, 3), 10 * number, np.uint8)).save(path)
    options = {"train_data": tmp_path / "images", "target_data": tmp_path / "target"}
    options |= {"per_device_train_batch_size": 4, "examples_per_class": 5}
    main(flags(tmp_path / "out", **options))
    results = results_of(tmp_path / "out")
    assert results["training_images"] == 20 and results["classes"] == ["dark", "light"]
    assert results["labelled_images"] == 10
    assert results["evaluation"]["pretrained"]["top1"] == 1.0  # black and white


def test_fashion_mnist_as_debian_has_it(tmp_path):
    from nso_hf.tasks.images.fashion_mnist import fashion_mnist

    arrays, labels = idx_files(tmp_path / "data")
    found, names = fashion_mnist("test", str(tmp_path / "data"))
    assert np.array_equal(found, arrays["test"]) and len(names) == len(labels["test"])
    assert names[0] == "T-shirt/top" and names[9] == "ankle boot"
    options = {"train_data": "fashion_mnist", "target_data": "fashion_mnist"}
    options |= {"fashion_mnist_folder": tmp_path / "data", "examples_per_class": 1}
    options |= {"image_size": 28, "patch_size": 7, "per_device_train_batch_size": 4}
    main(flags(tmp_path / "out", **options, max_steps=1))
    assert results_of(tmp_path / "out")["training_images"] == 30


def test_the_emoji(tmp_path):
    options = {"train_data": "openmoji", "target_data": "openmoji", "image_size": 16}
    main(flags(tmp_path, **options, patch_size=8, num_channels=3, max_steps=1))
    results = results_of(tmp_path)
    assert results["training_images"] > 1500 and "face" in results["classes"]


@pytest.mark.distributed
def test_torchrun_with_two_processes(tmp_path):
    recipe = str(ROOT / "recipes" / "mae_pretraining.py")
    options = {"evaluation": "fine_tune", "fine_tune_epochs": 2}
    torchrun([recipe, *flags(tmp_path, **options)], timeout=180)
    results = results_of(tmp_path)
    assert results["processes"] == 2 and results["backend"] == "DistributedDataParallel"
    assert results["evaluation"]["pretrained"]["images"] == 360


def test_the_shipped_config_is_valid(tmp_path, monkeypatch):
    from nso_hf.running.command_line import RecipeParser

    monkeypatch.chdir(ROOT)
    config = str(ROOT / "recipes" / "configs" / "demo_mae.yaml")
    parser = RecipeParser(OPTIONS, configs=ROOT / "recipes" / "configs")
    *_, args = parser.parse(["--config", config, "--use_cpu", "true"])
    assert args.rademacher_strength == 0.01 and args.sigma == 0.003
    assert parser._named_configs() == ["demo_mae"]

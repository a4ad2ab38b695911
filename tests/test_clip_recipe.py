"""The CLIP recipe from its command line to its files, on tiny models and shards."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from nso_hf.clip.pairs import read_image
from recipes.clip_pretraining import OPTIONS, main
from tests.clip.test_pairs import BROKEN, shards, write_shard
from tests.distributed.launch import torchrun
from tests.refusals import SMALL_CLIP

ROOT = Path(__file__).parent.parent


def flags(folder, output, **options):
    folder.mkdir(exist_ok=True)
    (folder / "small.json").write_text(json.dumps(SMALL_CLIP))
    urls = shards(folder, [12, 12])
    base = {
        "model": folder / "small.json",
        "train_data": urls,
        "eval_data": folder / "s-000.tar",
        "output_dir": output,
        "use_cpu": "true",
        "report_to": "none",
        "max_steps": 4,
        "logging_steps": 1,
        "sigma": 0.02,
        "warmup_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "seed": 3,
    }
    return [
        str(word) for name, value in {**base, **options}.items() for word in (f"--{name}", value)
    ]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_end_to_end(tmp_path, capsys):
    write_shard(tmp_path / "bad.tar", BROKEN)
    options = {
        "train_data": f"{shards(tmp_path, [12, 12])}::{tmp_path}/bad.tar",
        "zero_shot_data": tmp_path / "s-001.tar",
        "label_column": "kind",
        "templates": "simple",
        "linear_probe": "true",
        "curvature": "true",
        "curvature_batches": 1,
        "curvature_samples": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_steps": -1,
        "log_sharpness": "true",
    }
    main(flags(tmp_path, tmp_path / "out", **options))
    out, results = tmp_path / "out", results_of(tmp_path / "out")
    assert results["steps"] == 6 and results["training_pairs"] == 29
    training = [entry for entry in results["log"] if "loss" in entry]
    for entry in training:
        assert entry["nso/sigma"] == 0.02 and entry["nso/perturbation_norm"] > 0
        assert entry["clip/logit_scale"] == pytest.approx(14.3, abs=0.2)
    evaluations = [entry for entry in results["log"] if "eval_loss" in entry]
    assert len(evaluations) == 3
    # Evaluated again at the end, by the same weights.
    assert results["validation_loss"] == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-6)
    recall = results["retrieval"]["metrics"]["text_to_image_recall@10"]
    assert recall == evaluations[-1]["eval_text_to_image_recall@10"]
    assert results["retrieval"]["chance"]["text_to_image_recall@10"] == pytest.approx(10 / 12)
    assert results["zero_shot"]["classes"] == results["linear_probe"]["classes"] == 2
    assert results["zero_shot"]["images"] == 12
    assert set(results["curvature"]) == {"all", "image tower", "text tower"}
    skipped = results["skipped"]["training pairs, over all passes"]
    assert set(skipped) == {"unreadable images", "missing images", "missing captions"}
    assert read_image(out / "retrieval.png").size[0] > 500
    assert (out / "training.png").exists()
    shown = capsys.readouterr().out
    for words in ("Retrieval among 12 images", "chance", "linear probe", "text tower", "Skipped"):
        assert words in shown


def test_open_clip_loads_what_is_written(tmp_path):
    main(flags(tmp_path, tmp_path / "out", save_strategy="steps", save_steps=2))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    images, texts = torch.randn(2, 3, 16, 16), open_clip.tokenize(["a", "b"], context_length=8)
    by_folder, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    by_file, *_ = open_clip.create_model_and_transforms(
        "small", pretrained=str(tmp_path / "out" / "model.safetensors")
    )
    assert by_folder.logit_scale.item() == pytest.approx(weights["logit_scale"].item())
    for name, weight in by_folder.state_dict().items():
        assert torch.equal(weight.flatten(), weights[name].flatten()), name
        assert torch.equal(weight, by_file.state_dict()[name])
    assert preprocess.transforms[0].size == 16
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}/out")
    assert tokenizer(["a"]).shape == (1, 8)
    for step in (2, 4):
        assert (tmp_path / "out" / f"checkpoint-{step}" / "open_clip_config.json").exists()
    outputs = by_folder(images, texts)
    # And the recipe goes on from them as from any other weights.
    options = {"pretrained": tmp_path / "out" / "model.safetensors", "learning_rate": 0}
    main(flags(tmp_path, tmp_path / "more", **options, max_steps=1))
    again, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/more")
    assert torch.equal(again(images, texts)[0], outputs[0])


@pytest.mark.parametrize(
    "options",
    [
        {"siglip": "true"},
        {"lock_image": "true", "patch_dropout": 0.5},
        {"lock_text": "true", "bf16": "true"},
        {"gradient_checkpointing": "true", "gradient_accumulation_steps": 2},
        {"torch_compile": "true", "torch_compile_backend": "aot_eager", "image_size": 32},
    ],
    ids=["siglip", "locked image tower", "locked text tower, bf16", "checkpointing", "compiled"],
)
def test_ways_to_train(tmp_path, options):
    torch.manual_seed(3)
    main(flags(tmp_path, tmp_path / "out", **options, max_steps=2, learning_rate=1e-2))
    trained = load_file(tmp_path / "out" / "model.safetensors")
    main(flags(tmp_path, tmp_path / "start", **options, max_steps=1, learning_rate=0))
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert trained.keys() == start.keys()
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    image = {name for name in trained if name.startswith("visual.")}
    logits = {"logit_scale", "logit_bias"} & set(trained)
    assert ("logit_bias" in trained) == ("siglip" in options)
    expected = set(trained)
    if "lock_image" in options:
        expected -= image
    if "lock_text" in options:
        expected &= image | logits
    assert moved == expected
    losses = [entry["loss"] for entry in results_of(tmp_path / "out")["log"] if "loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_resume_is_the_uninterrupted_run(tmp_path, interrupt_at):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    main(flags(tmp_path, tmp_path / "whole", **saving))
    with (
        interrupt_at(5),
        pytest.raises(SystemExit, match=r"Interrupted at step 5; .*checkpoint-4.*goes on"),
    ):
        main(flags(tmp_path, tmp_path / "part", **saving))
    main(flags(tmp_path, tmp_path / "part", **saving, resume_from_checkpoint="last"))
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    assert whole["retrieval"] == part["retrieval"]


def test_an_interrupt_of_the_measurements_loses_none_of_the_training(tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    main(flags(tmp_path, tmp_path / "whole", **saving))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nso_hf.clip.retrieval.retrieval", interrupt)
        with pytest.raises(SystemExit, match=r"Interrupted at step 3; .*checkpoint-3.*goes on"):
            main(flags(tmp_path, tmp_path / "part", **saving))
    main(flags(tmp_path, tmp_path / "part", **saving, resume_from_checkpoint="last"))
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    assert whole["steps"] == part["steps"] == 3
    assert whole["retrieval"] == part["retrieval"]


@pytest.mark.distributed
def test_torchrun_with_two_processes(tmp_path):
    """From streamed shards, and evaluated, with a round that one process has nothing in."""
    recipe = str(ROOT / "recipes" / "clip_pretraining.py")
    options = {"eval_strategy": "steps", "eval_steps": 2, "zero_shot_data": tmp_path / "s-001.tar"}
    options |= {"label_column": "kind", "templates": "name", "curvature": "true"}
    torchrun([recipe, *flags(tmp_path, tmp_path / "out", **options)], timeout=180)
    results = results_of(tmp_path / "out")
    assert results["processes"] == 2 and results["backend"] == "DistributedDataParallel"
    assert results["retrieval"]["images"] == 12
    # The same weights, evaluated by one process.
    options |= {"pretrained": tmp_path / "out" / "model.safetensors", "learning_rate": 0}
    main(flags(tmp_path, tmp_path / "one", **options, max_steps=1))
    one = results_of(tmp_path / "one")
    assert results["retrieval"] == one["retrieval"]
    assert results["zero_shot"] == one["zero_shot"]
    assert results["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
    for tower, figures in results["curvature"].items():
        assert figures["trace"] == pytest.approx(one["curvature"][tower]["trace"], rel=1e-3)


@pytest.mark.parametrize("name", ["demo_clip", "cc3m"])
def test_shipped_configs_are_valid(name, tmp_path, monkeypatch):
    from nso_hf.command_line import RecipeParser

    monkeypatch.chdir(ROOT)
    required = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    if name == "cc3m":
        required += ["--train_data", "x.tar"]
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    *_, args = RecipeParser(OPTIONS).parse(["--config", str(config), *required])
    assert args.sigma == 0.01 and args.learning_rate == 1e-3


def test_the_embedded_emoji(tmp_path):
    """What `make demo-clip` trains on: no concept is in both splits."""
    from nso_hf.clip.openmoji import _concept, openmoji_pairs

    train, test = openmoji_pairs("train"), openmoji_pairs("test")
    assert len(train) > 1500 and len(test) > 350
    concepts = [{_concept(pair.caption) for pair in pairs} for pairs in (train, test)]
    assert concepts[0].isdisjoint(concepts[1])
    assert len({label for label in test.labels() if label}) >= 8
    image = read_image(next(iter(test)).image)
    assert image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255)

"""The CLIP recipe from its command line to its files, on tiny models and shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from nso_hf.tasks.clip.encoding import Encoded
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.report import plot_retrieval
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.images.reading import read_image
from recipes.clip_pretraining import OPTIONS, main
from tests.distributed.launch import torchrun
from tests.refusals import SMALL_CLIP
from tests.tasks.clip.test_pairs import BROKEN, png, shards, write_shard

ROOT = Path(__file__).parents[2]


def flags(folder, output, **options):
    folder.mkdir(exist_ok=True)
    (folder / "small.json").write_text(json.dumps(SMALL_CLIP), encoding="utf-8")
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
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


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
    per_class = results["zero_shot"]["per_class"]
    assert {name: found["images"] for name, found in per_class.items()} == {"even": 6, "odd": 6}
    right = sum(found["images"] * found["accuracy"] for found in per_class.values())
    assert results["zero_shot"]["images"] == 12
    assert right == pytest.approx(12 * results["zero_shot"]["top1"])
    assert set(results["curvature"]) == {"all", "image tower", "text tower"}
    skipped = results["skipped"]["training pairs, over all passes"]
    assert set(skipped) == {"unreadable images", "missing images", "missing captions"}
    assert read_image(out / "retrieval.png").size[0] > 500
    assert (out / "training.png").exists()
    shown = capsys.readouterr().out
    for words in ("Retrieval among 12 images", "chance", "linear probe", "text tower", "Skipped"):
        assert words in shown
    assert "Accuracy in each class" in shown and "majority" in shown and "R@10" in shown


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


def test_going_on_with_something_else(tmp_path, capsys):
    """Another sigma is printed and kept; other data, another model or another loss are refused."""
    out, model = tmp_path / "out", tmp_path / "small.json"
    main(flags(tmp_path, out, save_strategy="steps", save_steps=2, max_steps=2))
    results = (out / "results.json").read_text(encoding="utf-8")
    options = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "last"}
    refused = {
        "siglip=True: this run began with False": {"siglip": "true"},
        "lock_text=True: this run began with False": {"lock_text": "true"},
        "optim='adafactor': this run began with": {"optim": "adafactor"},
        "caption_column='kind': this run began with": {"caption_column": "kind"},
    }
    for message, changed in refused.items():
        with pytest.raises(ValueError, match=message):
            main(flags(tmp_path, out, **(options | changed)))
    # The same names, which stand for something else by now.
    same = flags(tmp_path, out, **options)
    model.write_text(json.dumps(SMALL_CLIP | {"quick_gelu": True}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model=.*small.json': not the architecture that this"):
        main(same)
    same = flags(tmp_path, out, **options)
    write_shard(tmp_path / "s-000.tar", BROKEN)
    with pytest.raises(ValueError, match=r"train_data=.*: not the training pairs that this run"):
        main(same)
    assert (out / "results.json").read_text(encoding="utf-8") == results  # nothing is lost
    capsys.readouterr()
    main(flags(tmp_path, out, **options, sigma=0.5, curvature_samples=3))
    changes = "curvature_samples 20 -> 3; max_steps 2 -> 4; sigma 0.02 -> 0.5"
    shown = capsys.readouterr().out
    assert all(change in shown for change in changes.split("; ")), shown
    kept = results_of(out)["options"]
    assert kept[0]["options"]["sigma"] == 0.02 and kept[0]["options"]["siglip"] is False
    changed = {"max_steps": 4, "sigma": 0.5, "curvature_samples": 3}
    assert kept[1:] == [{"from_step": 2, "options": changed}]


def without(package, *flags):
    """The recipe where this package is not installed."""
    program = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[0] = 'recipe'; "
    program += "runpy.run_path('recipes/clip_pretraining.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, flags)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_help_and_refusals_do_not_need_the_extra(tmp_path):
    helped = without("open_clip", "--help")
    assert helped.returncode == 0 and "--siglip" in helped.stdout and "--sigma" in helped.stdout
    required = ["--model", "ViT-S-16", "--train_data", "x.tar", "--output_dir", tmp_path / "out"]
    required += ["--use_cpu", "true"]
    for wrong, line in {
        ("--templates", "imagenet"): "error: templates='imagenet': unknown, and no such file. Use "
        "openai, simple, name, or the path of a text file.",
        (): "error: clip_pretraining.py needs open_clip: run pip install 'nso_hf[clip]'",
    }.items():
        refused = without("open_clip", *required, *wrong)
        assert refused.returncode == 1 and refused.stderr.splitlines() == [line]
    assert not (tmp_path / "out").exists()


def test_the_picture_of_retrieval_holds_captions_and_says_what_frames_mean(tmp_path, monkeypatch):
    captions = ["a dog", "W" * 90, "a long caption that goes on " * 12, "$x_1$ of <b>", "é", "_ _"]
    rows = [{"image": png(i), "caption": caption} for i, caption in enumerate(captions)]
    pairs = Table("rows", rows, Fields("image", "caption"), None)
    features = torch.eye(len(rows)).roll(1, dims=0)  # the right image is among those that are found
    encoded = Encoded(
        images=features,
        texts=features,
        keys=[pair.key for pair in pairs],
        captions=captions,
        labels=[None] * len(rows),
        index=list(range(len(rows))),
        loss=0.0,
    )
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **o: (save(f, *a, **o), drawn.append(f)))
    plot_retrieval(encoded, pairs, tmp_path / "x.png", found=4)
    (figure,) = drawn
    assert "4 images" in figure.get_suptitle() and "Green frame" in figure.get_suptitle()
    texts = [text for axis in figure.axes for text in axis.texts]
    shown = ["".join(text.get_text().split()) for text in texts]
    assert shown == ["".join(caption.split()) for caption in captions]
    boxes = [text.get_window_extent() for text in texts]
    boxes += [axis.get_window_extent() for axis in figure.axes if axis.images]
    boxes.append(figure._suptitle.get_window_extent())
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:number])
    framed = [a for a in figure.axes if a.images and a.spines["top"].get_visible()]
    assert len(framed) == len(rows)


def test_the_report_fits_a_terminal_and_survives_one_of_ascii(tmp_path):
    """Names are shown as they are, figures in full, in 80 columns."""
    names = ["[red]cat[/red]", ":dog:", *(f"class {n}" for n in range(30))]
    per_class = {name: {"images": 40 - n, "accuracy": 0.5} for n, name in enumerate(names)}
    shares = {"top1": 0.123, "top5": 0.567, "mean_per_class": 0.1, "chance": 1 / 32}
    shares |= {"majority": 40 / 784, "stderr": 0.0117}
    classified = {**shares, "classes": 32, "images": 1234, "per_class": per_class}
    metrics = {f"{a}_to_{b}": 0.25 for a, b in [("image", "text"), ("text", "image")]}
    recalls = {f"{way}_recall@{k}": 0.25 for way in metrics for k in (1, 5, 10)}
    ranks = {f"{way}_{kind}_rank": 1234.5 for way in metrics for kind in ("mean", "median")}
    retrieval = {"images": 9, "texts": 9, "metrics": recalls | ranks, "chance": recalls}
    results = {"log": [], "skipped": {}, "zero_shot": classified, "linear_probe": classified}
    results["nso_options"] = {"method": "nso", "sigma": 0.1}
    results["retrieval"] = retrieval
    program = "import json, sys; from pathlib import Path\n"
    program += (
        "from nso_hf.tasks.clip.report import report; from nso_hf.running.program import run\n"
    )
    program += "run(lambda: report(json.load(sys.stdin), Path(sys.argv[1]), None, None))"
    printed = {}
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            input=json.dumps(results).encode(),
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"},
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        printed[encoding] = done.stdout.decode(encoding)
    tables = printed["utf-8"].partition("Written:")[0]
    for words in ("[red]cat[/red]", ":dog:", "12.3 ± 1.2", "image → text", "56.7", "3.1", "5.1"):
        assert words in tables
    assert "…" not in tables and "12 more classes are in results.json" in tables
    assert "12.3 \\xb1 1.2" in printed["ascii"] and "image \\u2192 text" in printed["ascii"]


def test_an_interrupt_of_the_measurements_loses_none_of_the_training(tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    main(flags(tmp_path, tmp_path / "whole", **saving))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nso_hf.tasks.clip.measures.retrieval", interrupt)
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
    from nso_hf.running.command_line import RecipeParser

    monkeypatch.chdir(ROOT)
    required = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    if name == "cc3m":
        required += ["--train_data", "x.tar"]
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    *_, args = RecipeParser(OPTIONS).parse(["--config", str(config), *required])
    assert args.sigma == 0.01 and args.learning_rate == 1e-3


def test_the_embedded_emoji(tmp_path):
    """What `make demo-clip` trains on: no concept is in both splits."""
    from nso_hf.tasks.clip.openmoji import openmoji_pairs
    from nso_hf.tasks.images.openmoji import concept

    train, test = openmoji_pairs("train"), openmoji_pairs("test")
    assert len(train) > 1500 and len(test) > 350
    labelled = openmoji_pairs("test", labelled=True)
    shown = [pair.caption for pair in test if pair.label is not None]
    assert [pair.caption for pair in labelled] == shown and len(shown) < len(test)
    concepts = [{concept(pair.caption) for pair in pairs} for pairs in (train, test)]
    assert concepts[0].isdisjoint(concepts[1])
    assert len({label for label in test.labels() if label}) >= 8
    image = read_image(next(iter(test)).image)
    assert image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255)


def fine_tuning(folder):
    labelled = ["--label_column", "kind", "--templates", "name"]
    also = ["--eval_also", f"first={folder}/s-000.tar", f"all={folder}/s-{{000..001}}.tar"]
    return [*labelled, *also, "--wise_ft", "0", "0.5", "1"]


def test_fine_tuning_keeps_what_it_began_with(tmp_path, capsys, interrupt_at):
    """Also where it is interrupted: what is written, and what is measured with the first weights,
    is as in a run to the end."""
    main(flags(tmp_path, tmp_path / "pre", learning_rate=1e-2))
    options = {"pretrained": tmp_path / "pre" / "model.safetensors", "learning_rate": 1e-2}
    options |= {"zero_shot_data": tmp_path / "s-001.tar", "save_strategy": "steps", "save_steps": 2}
    plain = flags(tmp_path, tmp_path / "plain", **options, label_column="kind", templates="name")
    main(plain)
    kept = [*flags(tmp_path, tmp_path / "kept", **options), *fine_tuning(tmp_path)]
    with interrupt_at(3), pytest.raises(SystemExit, match="Interrupted at step 3"):
        main(kept)
    capsys.readouterr()
    main([*kept, "--resume_from_checkpoint", "last"])
    shown = capsys.readouterr().out
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", "kept"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    results = results_of(tmp_path / "kept")
    assert results["zero_shot"] == results_of(tmp_path / "plain")["zero_shot"]
    points = results["wise_ft"]
    assert [point["alpha"] for point in points] == [0, 0.5, 1]
    assert points[-1]["zero_shot"]["accuracy"] == results["zero_shot"]["top1"]
    # The weights that it began with, evaluated by a run of their own.
    still = flags(tmp_path, tmp_path / "still", **(options | {"learning_rate": 0}))
    main([*still, *fine_tuning(tmp_path)])
    first = results_of(tmp_path / "still")
    assert points[0] == first["wise_ft"][0]
    assert results["forgetting"]["all"]["before"] == first["forgetting"]["all"]["after"]
    assert first["forgetting"]["all"]["change"] == 0
    assert "Weights between" in shown and "Zero-shot accuracy elsewhere" in shown
    assert (tmp_path / "kept" / "wise_ft.png").exists()


def test_what_choosing_options_leaves_unseen(tmp_path):
    main(flags(tmp_path, tmp_path / "pre", max_steps=1))
    options = {"pretrained": tmp_path / "pre" / "model.safetensors", "test": "false"}
    options |= {"zero_shot_data": tmp_path / "s-001.tar", "linear_probe": "true", "max_steps": 1}
    main([*flags(tmp_path, tmp_path / "out", **options), *fine_tuning(tmp_path)])
    results = results_of(tmp_path / "out")
    assert results["retrieval"]["images"] == 12
    assert not {"zero_shot", "linear_probe", "forgetting", "wise_ft"} & results.keys()

"""Weights between the first and the last: the formula, nothing left behind, what is measured."""

import open_clip
import pytest
import torch

from nso_hf.tasks.clip.labelled import Labelled
from nso_hf.tasks.clip.measures import kept
from nso_hf.tasks.clip.options import EvaluationOptions
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.report import plot_wise_ft
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.clip.trainer import CLIPTrainer
from nso_hf.tasks.clip.wise_ft import FirstWeights
from nso_hf.tasks.images.reading import read_image
from tests.tasks.clip.reference import clip_config, image_rows, pair_data, tiny_clip

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}


def fine_tuned(folder, images=16, **options):
    clip = tiny_clip(**options)
    first = FirstWeights(clip.model)
    data = pair_data(24)
    if images != 16:
        data = [{**row, "image": torch.randn(3, images, images)} for row in data]
    trainer = CLIPTrainer(clip, clip_config(folder, sigma=0.02), train_dataset=data)
    start = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    trainer.train()
    return trainer, first, start


@pytest.mark.parametrize("kind", ["transformer", "batch norm"])
def test_between_two_models(tmp_path, kind):
    """As the paper's own loop over two state dicts; afterwards bit for bit as before."""
    options = {"vision_cfg": RESNET, "images": 32} if kind == "batch norm" else {}
    trainer, first, start = fine_tuned(tmp_path, **options)
    model = trainer.clip.model
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = [name for name in end if not torch.equal(start[name], end[name])]
    assert any("running_mean" in name for name in moved) == (kind == "batch norm")
    for alpha in (0.0, 0.3, 1.0):
        with first.interpolated(trainer, alpha):
            for name, now in model.state_dict().items():
                if not now.is_floating_point():
                    assert torch.equal(now, end[name])
                    continue
                expected = (1 - alpha) * start[name].double() + alpha * end[name].double()
                # float32: three roundings of numbers below 5.
                torch.testing.assert_close(now.double(), expected, rtol=0, atol=2e-6)
                if alpha in (0, 1):
                    assert torch.equal(now, (start, end)[int(alpha)][name]), name
    with pytest.raises(RuntimeError, match="within"), first.interpolated(trainer, 0.5):
        raise RuntimeError("within")
    assert all(torch.equal(now, end[name]) for name, now in model.state_dict().items())
    with pytest.raises(ValueError, match=r"alpha=1.5: must be a finite number, in \[0, 1\]"):
        first.interpolated(trainer, 1.5).__enter__()


def test_what_is_kept_is_measured_by_each_model_alone(tmp_path):
    """Against zero-shot classification by open_clip with models that are loaded, one by one."""
    trainer, first, start = fine_tuned(tmp_path)
    rows = image_rows(11)
    pairs = Table("rows", rows, Fields("image", "caption", "label"), None)
    labelled = Labelled(pairs, ["even", "odd"], {"even": "even", "odd": "odd"})
    options = EvaluationOptions(templates="name")
    figures = {}
    for found in kept(trainer, {"also": labelled}, labelled, first, options, [0.0, 0.4, 1.0]):
        figures |= found
    end = {name: tensor.clone() for name, tensor in trainer.clip.model.state_dict().items()}
    for point in figures["wise_ft"]:
        other = tiny_clip(seed=7)
        between = {n: torch.lerp(start[n], end[n], point["alpha"]) for n in end}
        other.model.load_state_dict(between)
        other.model.eval()
        with torch.no_grad():
            images = torch.stack([other.eval_transform(row["image"]) for row in rows])
            features = other.model.encode_image(images, normalize=True)
            weights = open_clip.build_zero_shot_classifier(
                other.model, other.tokenizer, ["even", "odd"], ["{}"]
            )
        guesses = (features @ weights).argmax(dim=1).tolist()
        right = [("even", "odd")[g] == row["label"] for g, row in zip(guesses, rows, strict=True)]
        assert point["zero_shot"]["accuracy"] == pytest.approx(sum(right) / 11)
        assert point["also"]["also"] == point["zero_shot"]
    also = figures["forgetting"]["also"]
    ends = [figures["wise_ft"][i]["also"]["also"] for i in (0, 2)]
    assert (also["before"], also["after"]) == tuple(ends) and also["kind"] == "task"
    assert also["change"] == pytest.approx(ends[1]["accuracy"] - ends[0]["accuracy"])
    plot_wise_ft(figures["wise_ft"], tmp_path / "wise_ft.png")
    assert read_image(tmp_path / "wise_ft.png").size[0] > 500

"""Training images are changed as a function of the seed, the pass and the image alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from nso_hf.tasks.images.augmentation import Augmented, transform_of
from nso_hf.tasks.images.classifier_options import AUGMENTATIONS
from nso_hf.tasks.images.dataset import Images, Labelled, Pixels

PIXELS = Pixels(16, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.5))


def examples(number=12):
    rng = np.random.default_rng(0)
    stored = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(number)]
    images = Images("random", stored, ["a", "b"] * (number // 2), PIXELS)
    return Labelled(images, range(1, number), [i % 2 for i in range(1, number)])


def augmented(names=("crop", "flip", "trivial"), seed=0):
    return Augmented(examples(), transform_of(names, 16), seed)


def pixels(data, epoch):
    data.set_epoch(epoch)
    return torch.stack([data[i]["pixel_values"] for i in range(len(data))])


@pytest.mark.parametrize("name", AUGMENTATIONS[1:])
def test_a_function_of_seed_epoch_and_image(name):
    first = pixels(augmented([name]), 0)
    torch.manual_seed(7)  # whatever is drawn elsewhere
    state = torch.get_rng_state()
    assert torch.equal(pixels(augmented([name]), 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(pixels(augmented([name]), 1), first)
    assert not torch.equal(pixels(augmented([name], seed=1), 0), first)
    assert first.shape == (11, 3, 16, 16)


def test_labels_and_images_stay_together():
    plain, changed = examples(), augmented(["flip"])
    flipped = 0
    for place in range(len(plain)):
        image, new = plain[place]["pixel_values"], changed[place]["pixel_values"]
        is_flipped = torch.equal(new, image.flip(-1))
        assert is_flipped or torch.equal(new, image)
        flipped += is_flipped
        assert changed[place]["labels"] == plain[place]["labels"]
    assert 0 < flipped < len(plain)


def test_workers_that_live_on_are_told_the_epoch():
    data = augmented()
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        data.set_epoch(epoch)
        loaded = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(loaded, pixels(augmented(), epoch))


def test_the_processor_that_is_written_does_the_same(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    PIXELS.write(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    square = Image.effect_noise((16, 16), 60).convert("RGB")
    seen = torch.as_tensor(np.asarray(processor(square)["pixel_values"][0]))
    torch.testing.assert_close(seen, PIXELS.of(square), rtol=0, atol=1e-6)  # in another order
    ramp = np.linspace(0, 255, 60, dtype=np.uint8)
    wide = Image.fromarray(np.broadcast_to(ramp[None, :, None], (32, 60, 3)).copy())
    seen = torch.as_tensor(np.asarray(processor(wide)["pixel_values"][0]))
    # Of the middle; resized before it is cropped, and not after: half a pixel of 60, of 8.5 levels
    # in 255, and rounded, all by a standard deviation of .2.
    assert (seen - PIXELS.of(wide)).abs().max() < (8.5 / 2 + 1) / 255 / 0.2

"""Training images changed anew in each pass."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from nso_hf.refusal import needs
from nso_hf.tasks.images.dataset import Labelled


def transform_of(names: Sequence[str], image_size: int) -> Any:
    """A transform of images by the names of its parts, in their order."""
    needs("--augmentation", "images", "torchvision")
    from torchvision.transforms import v2

    made = {
        "flip": v2.RandomHorizontalFlip,
        "crop": lambda: v2.RandomCrop(image_size, padding=max(1, image_size // 8)),
        "resized_crop": lambda: v2.RandomResizedCrop(
            image_size, interpolation=v2.InterpolationMode.BICUBIC
        ),
        "trivial": v2.TrivialAugmentWide,
        "randaugment": v2.RandAugment,
    }
    return v2.Compose([made[name]() for name in names])


class Augmented(Dataset[dict[str, Any]]):
    """Training images, each changed as a function of `seed`, the epoch, and which image it is: so
    it is the same in all evaluations of a step, in a run that goes on, and whatever the batch size,
    the number of processes and of workers.

    Args:
        transform: of `torchvision`, on images of the model's size but for one that crops; it draws
            from torch's global generator.
    """

    def __init__(self, examples: Labelled, transform: Any, seed: int) -> None:
        self.examples, self.transform, self.seed = examples, transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may live on

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next images are of."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        images, index = self.examples.images, self.examples.indices[position]
        key = f"{self.seed} {int(self._epoch)} {index}".encode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
            image: Image.Image = self.transform(images.image(index))
        label = int(self.examples.targets[position])
        return {"pixel_values": images.pixels.of(image), "labels": label}

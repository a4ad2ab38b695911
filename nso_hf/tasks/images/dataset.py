"""Images as models take them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from nso_hf.tasks.images.reading import read_image


@dataclass(frozen=True)
class Pixels:
    """How an image becomes a tensor: cropped to a square about its middle, resized, scaled."""

    image_size: int
    num_channels: int
    """1: grey."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel, its values being in [0, 1]."""

    def of(self, image: Image.Image) -> Tensor:
        """(C, S, S), float32."""
        size = (self.image_size, self.image_size)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        if self.num_channels == 1:
            image = image.convert("L")
        values = torch.from_numpy(np.array(image)).view(*size, self.num_channels).permute(2, 0, 1)
        return (values / 255 - self._column(self.mean)) / self._column(self.std)

    def shown(self, pixel_values: Tensor) -> Tensor:
        """(..., C, S, S) -> (..., S, S, C) in [0, 1], as they are drawn."""
        values = pixel_values * self._column(self.std) + self._column(self.mean)
        return values.clamp(0, 1).movedim(-3, -1)

    def _column(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[:, None, None]


class Images(Dataset[dict[str, Tensor]]):
    """Images, each with a class or without.

    Args:
        name: of the collection.
        stored: encoded bytes, paths, or PIL images.
        labels: the class of each; None where it has none.
        pixels: how they become tensors.
    """

    def __init__(
        self, name: str, stored: Sequence[Any], labels: Sequence[str | None], pixels: Pixels
    ) -> None:
        self.name, self.labels, self.pixels = name, labels, pixels
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` (C, S, S)."""
        return {"pixel_values": self.pixels.of(read_image(self._stored[index]))}

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(n, C, S, S)."""
        return torch.stack([self[index]["pixel_values"] for index in indices])

    def digest(self) -> str:
        """Of all labels, and of a thousand of the images as the model sees them."""
        digest = hashlib.sha256(repr((len(self), list(self.labels))).encode())
        for index in range(0, len(self), -(-len(self) // 1000)):
            digest.update(self[index]["pixel_values"].numpy().tobytes())
        return digest.hexdigest()


class Labelled(Dataset[dict[str, Any]]):
    """Some of the images, with the numbers of their classes as `labels`; `targets` has all (n,)."""

    def __init__(self, images: Images, indices: Sequence[int], classes: Sequence[str]) -> None:
        number = {label: index for index, label in enumerate(classes)}
        numbers = [number[str(images.labels[index])] for index in indices]
        self.images, self.indices, self.targets = images, indices, torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.images[self.indices[position]], "labels": int(self.targets[position])}


class WithTargetImages(Dataset[dict[str, Tensor]]):
    """Training images, each batch with as many different images of the task to come, unlabelled.

    Which these are is a function of `seed` and of the batch's images alone: so they are the same
    when a run goes on, with any number of workers, and differ between processes and epochs as the
    batches do.
    """

    def __init__(self, images: Dataset[dict[str, Tensor]], targets: Images, seed: int) -> None:
        self.images, self.targets, self.seed = images, targets, seed

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """What PyTorch's loader calls with the indices of a batch."""
        rng = np.random.default_rng([self.seed, *indices])
        chosen = rng.choice(len(self.targets), len(indices), replace=False)
        return [
            {**self.images[index], "target_pixel_values": self.targets[target]["pixel_values"]}
            for index, target in zip(indices, chosen.tolist(), strict=True)
        ]

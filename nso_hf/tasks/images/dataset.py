"""Images as models take them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from nso_hf.refusal import refusal
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

    def fitted(self, image: Image.Image) -> Image.Image:
        """A square of the model's size."""
        size = (self.image_size, self.image_size)
        return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BICUBIC)

    def of(self, image: Image.Image) -> Tensor:
        """(C, S, S), float32."""
        size = (self.image_size, self.image_size)
        image = self.fitted(image)
        if self.num_channels == 1:
            image = image.convert("L")
        values = torch.from_numpy(np.array(image)).view(*size, self.num_channels).permute(2, 0, 1)
        return (values / 255 - self._column(self.mean)) / self._column(self.std)

    def write(self, folder: Path) -> None:
        """With the weights in `folder`, what `AutoImageProcessor.from_pretrained` reads to do the
        same."""
        size, bicubic = self.image_size, Image.Resampling.BICUBIC.value
        config: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor"}
        config |= {"size": {"shortest_edge": size}, "resample": bicubic}
        config |= {"crop_size": {"height": size, "width": size}}
        config |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        config["do_convert_rgb"] = self.num_channels == 3
        text = json.dumps(config, indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

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
        classes: in the order of their numbers, where the data have one.
    """

    def __init__(
        self,
        name: str,
        stored: Sequence[Any],
        labels: Sequence[str | None],
        pixels: Pixels,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.name, self.labels, self.pixels, self.classes = name, labels, pixels, classes
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` (C, S, S)."""
        return {"pixel_values": self.pixels.of(self.image(index))}

    def image(self, index: int) -> Image.Image:
        """As it is stored, in RGB.

        Raises:
            ValueError: it cannot be read.
        """
        stored: Any = None
        try:
            stored = self._stored[index]
            return read_image(stored)
        except Exception as error:  # of its decoder: of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            which = stored if isinstance(stored, str) else f"image {index}"
            rule = f"{which} cannot be read ({reason})"
            raise refusal("data", self.name, rule, "Replace it, or leave it out") from error

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

    def __init__(self, images: Images, indices: Sequence[int], numbers: Sequence[int]) -> None:
        self.images, self.indices, self.targets = images, indices, torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.images[self.indices[position]], "labels": int(self.targets[position])}


def with_classes(images: Images) -> tuple[list[int], list[str]]:
    """The indices of those that have a class, and their classes."""
    found = [(index, label) for index, label in enumerate(images.labels) if label is not None]
    return [index for index, _ in found], [label for _, label in found]


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

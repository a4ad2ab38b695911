"""An image as it is seen: upright, opaque, in 8 bits a colour."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # of TIFF
_WHITE = {8: 2**8 - 1, 16: 2**16 - 1, 32: 2**31 - 1}


def read_image(image: Any) -> Image.Image:
    """The image in RGB, of bytes, a path, or a PIL image.

    Raises:
        Exception: whatever its decoder finds wrong with it.
    """
    if isinstance(image, Image.Image):
        return rgb(image)
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return rgb(opened)
    except UnidentifiedImageError as error:
        raise ValueError("in no format of images that Pillow knows") from error


def rgb(image: Image.Image) -> Image.Image:
    """In RGB: turned as its EXIF tag says, on white where it is transparent, and with 16 and 32
    bits and floats scaled by their depth."""
    upright = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(upright)
        greys = _in_eight_bits(levels, image)
        greys[levels == image.info.get("transparency", np.nan)] = 255  # one level, in PNG
        return Image.fromarray(greys).convert("RGB")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def _in_eight_bits(values: NDArray[Any], stored: Image.Image) -> NDArray[np.uint8]:
    tags = getattr(stored, "tag_v2", {})
    is_unsigned = stored.mode == "I" and tags.get(_SAMPLE_FORMAT) == (_UNSIGNED,)
    if is_unsigned:
        values = values.view(np.uint32)
    levels = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    white = 2**32 - 1 if is_unsigned else _white(levels, stored)
    return (255 * levels / white).round().clip(0, 255).astype(np.uint8)


def _white(levels: NDArray[np.float64], stored: Image.Image) -> float:
    """The value of white: that of its depth, where the format says it. Floats, and integers in
    memory, have the least of the usual ones that holds them all."""
    bits = getattr(stored, "tag_v2", {}).get(_BITS_PER_SAMPLE, (None,))[0]
    if stored.mode.startswith("I;16") or (stored.format == "PPM" and stored.mode == "I"):
        bits = 16
    if stored.mode != "F" and bits in _WHITE:
        return _WHITE[bits]
    usual = [*_WHITE.values()] if stored.mode == "I" else [1, *_WHITE.values()]
    highest = float(levels.max(initial=0))
    return next((white for white in usual if highest <= white), highest)

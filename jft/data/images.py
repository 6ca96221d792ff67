"""Image preprocessing: resize, crop, flip, normalise; on the CPU, with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jft.data.errors import DataError, choose

# mean, standard deviation per channel of pixels in [0, 1]
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),  # to [-1, 1], as ViT, SigLIP and BEiT checkpoints expect
    "none": ((0.0,), (1.0,)),  # to [0, 1]
}
RESIZES = ("shorter", "squash")
CROPS = ("center", "random")


@dataclass(frozen=True)
class ImageSettings:
    """The preprocessing of a picture to float32 [size, size, channels].

    size: pixels of the square. resize: "shorter" (the shorter side to ``size``, then a crop) or "squash" (both sides).
    crop: "center", or "random": in training, a box of ``area`` (fractions of the picture) and aspect ``ratio`` resized to
    ``size`` (Szegedy et al. 2015, 1409.4842); evaluation always takes the centre. flip: in training, mirror one in two.
    normalize: "clip", "imagenet", "half" ([-1, 1]) or "none" ([0, 1]). channels: 3 or 1. Resampling is bicubic.
    The default area is what CLIP fine-tuning uses (open_clip); ImageNet training from scratch uses [0.08, 1].
    """

    size: int
    resize: str = "shorter"
    crop: str = "center"
    flip: bool = False
    normalize: str = "half"
    channels: int = 3
    area: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise DataError(f"image.size must be a positive number of pixels, got {self.size!r}")
        choose(self.resize, RESIZES, "image.resize")
        choose(self.crop, CROPS, "image.crop")
        choose(self.normalize, NORMALISATIONS, "image.normalize")
        choose(self.channels, {1: 1, 3: 3}, "image.channels")
        for name in ("area", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "area" and high > 1):
                raise DataError(f"image.{name} must be two rising positive numbers, areas at most 1; got {(low, high)}")


def _picture(image: Any, channels: int) -> Any:
    """A Pillow image of uint8 [H, W], [H, W, 1 or 3 or 4], or of float in [-1, 1]."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise DataError(f"an image must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got shape {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        # Pillow resizes several channels in uint8 only.
        pixels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"an image must hold uint8 in [0, 255] or floats in [-1, 1], got {pixels.dtype}")
    return Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")


def _random_box(
    picture: tuple[int, int], settings: ImageSettings, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    width, height = picture
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    # Ten tries and then the centre, as torchvision.
    for _ in range(10):
        area = width * height * rng.uniform(*settings.area)
        # Uniform in the logarithm: twice as wide is as likely as twice as high.
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _center_box(width, height)


def _center_box(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def preprocess(image: Any, settings: ImageSettings, rng: np.random.Generator | None = None) -> np.ndarray:
    """float32 [size, size, channels] of one image; ``rng``: draw the training crop and flip from it (None: evaluation)."""
    from PIL import Image

    picture = _picture(image, settings.channels)
    size = (settings.size, settings.size)
    if rng is not None and settings.crop == "random":
        picture = picture.resize(size, Image.Resampling.BICUBIC, box=_random_box(picture.size, settings, rng))
    elif settings.resize == "squash":
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    else:
        shorter = min(picture.size)
        # Truncated, as torchvision's resize does.
        scaled = tuple(max(settings.size, int(settings.size * s / shorter)) for s in picture.size)
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (round((s - settings.size) / 2) for s in picture.size)
        picture = picture.crop((left, top, left + settings.size, top + settings.size))
    if rng is not None and settings.flip and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(picture, np.float32).reshape(*size, settings.channels) / 255
    mean, deviation = NORMALISATIONS[settings.normalize]
    if settings.channels == 1:
        mean, deviation = (float(np.mean(mean)),), (float(np.mean(deviation)),)
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)

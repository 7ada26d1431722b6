"""What happens to an image on its way into the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_normalisation(mean: Sequence[float], std: Sequence[float], prefix: str = "") -> None:
    """ValueError, whose message begins with `prefix` and the name, unless these can belong to values in [0, 1]."""
    for name, values, low in (("mean", mean, 0.0), ("std", std, 0.001)):
        if len(values) != 3 or not all(low <= value <= 1 for value in values):
            fractions = tuple(round(value / 255, 3) for value in values)
            likely = all(low <= value <= 1 for value in fractions)
            raise ValueError(
                f"{prefix}{name}: {tuple(values)!r} was given; allowed are 3 values from {low:g} to 1, of images with "
                "values in [0, 1]" + (f"; those of images in 0..255 are divided by 255: {fractions}" if likely else "")
            )


def build_transform(
    height: int,
    width: int,
    train: bool,
    *,
    flip: float = 0.5,
    pad: int = 10,
    erasing: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """RGB image (PIL, any size) -> float32 [3, height, width], normalised.

    In training, also: horizontal flip, zero padding and a random crop back to size, random erasing (Zhong et al., AAAI
    2020) with the mean colour. All randomness comes from torch's default generator.

    Called as transform(image, extras) with a dictionary of what `Extra.load` gives, it returns both, as tensors, after
    the same geometry and erasing.

    Args:
        height, width: in pixels, at least 1.
        train: whether to augment.
        flip, erasing: probabilities in [0, 1].
        pad: pixels added on each side before cropping, at least 0.
        mean, std: per channel, of values in [0, 1]; the mean in [0, 1], the standard deviation in [0.001, 1].

    Raises:
        ValueError: an argument outside what is allowed.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    for name, chance in (("flip", flip), ("erasing", erasing)):
        if not 0 <= chance <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {chance}")
    if pad < 0:
        raise ValueError(f"pad must be at least 0, got {pad}")
    check_normalisation(mean, std)
    steps: list[torch.nn.Module] = [v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)]
    if train and flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    if train and pad > 0:
        steps += [v2.Pad(pad), v2.RandomCrop((height, width))]
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
    if train and erasing > 0:
        steps.append(v2.RandomErasing(erasing, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=0))
    return v2.Compose([*steps, v2.ToPureTensor()])

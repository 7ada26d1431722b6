"""What goes along with an image, against the image itself: it must end up where the pixels do."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from vareid_ext.data import (
    BODY_PAIRS,
    EXTRAS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Extra,
    ImageList,
    PKSampler,
    ReidDataset,
    SyntheticSettings,
    build_transform,
    collate,
    synthetic_data,
    with_extra,
)
from vareid_ext.methods import Method

RAW = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def colours(height, width, low=1):
    """A picture without black, in which every pixel has a colour of its own."""
    order = np.random.default_rng(0).permutation(height * width).reshape(height, width)
    pixels = np.stack([order // 200 + low, order % 200 + low, np.full_like(order, 255)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def at_every_pixel(height, width):
    """A keypoint in the middle of every pixel, row by row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3).astype(np.float32)


def transformed(transform, picture, seed=0, **extras):
    loaded = {name: extra.load(0, picture.height, picture.width) for name, extra in extras.items()}
    torch.manual_seed(seed)
    return transform(picture, loaded)


def without_extras(height, width):
    """The transform as it was before there were extras."""
    return v2.Compose(
        [
            v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(10),
            v2.RandomCrop((height, width)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
            v2.ToPureTensor(),
            v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=0),
        ]
    )


def test_extras_change_neither_the_image_nor_the_random_numbers():
    transform, before = build_transform(48, 24, train=True), without_extras(48, 24)
    rng = np.random.default_rng(0)
    for seed in range(40):
        height, width = rng.integers(20, 80, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        torch.manual_seed(seed)
        expected, drawn = before(picture), torch.rand(())
        torch.manual_seed(seed)
        assert torch.equal(transform(picture), expected)
        assert torch.rand(()) == drawn
        extras = {
            "joints": Extra("keypoints", [np.ones((14, 3))], BODY_PAIRS),
            "mask": Extra("mask", [np.ones((7, 5))]),
            "pose": Extra("view", [np.ones((2, 3, height + 3, width), np.uint8)]),
        }
        image, _ = transformed(transform, picture, seed, **extras)
        assert type(image) is torch.Tensor
        assert torch.equal(image, expected)
        assert torch.rand(()) == drawn


@pytest.mark.parametrize("seed", range(20))
def test_keypoints_end_where_their_pixels_do(seed):
    picture = colours(30, 14)
    transform = build_transform(30, 14, train=True, pad=6, **RAW)
    points = Extra("keypoints", [at_every_pixel(30, 14)])
    image, extras = transformed(transform, picture, seed, points=points)
    x, y, seen = extras["points"].unbind(dim=1)
    original = torch.from_numpy(np.asarray(picture).reshape(-1, 3).copy()).float()
    kept = seen > 0
    assert torch.equal((image[:, y[kept].long(), x[kept].long()].T * 255).round(), original[kept])
    assert torch.equal(x[kept], x[kept].round())
    # Every pixel that is not black is one of them, so that those without confidence are gone from the image.
    assert int(kept.sum()) == int((image > 0).any(dim=0).sum())


@pytest.mark.parametrize("size", [(60, 20), (25, 33), (128, 64)])
def test_keypoints_end_where_a_resized_spot_does(size):
    height, width = 40, 30
    y, x = np.mgrid[:height, :width]
    for place, flip in itertools.product([(11.0, 9.0), (20.5, 26.25)], (0, 1)):
        spot = 255 * np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / 8)
        picture = Image.fromarray(np.stack([spot] * 3, axis=-1).round().astype(np.uint8))
        transform = build_transform(*size, train=True, flip=flip, pad=0, erasing=0, **RAW)
        points = Extra("keypoints", [np.array([[*place, 1.0]])])
        image, extras = transformed(transform, picture, points=points)
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        middle = torch.stack([(image[0] * axis).sum() / image[0].sum() for axis in (columns, rows)])
        torch.testing.assert_close(extras["points"][0, :2], middle, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["mask", "labels", "map"])
@pytest.mark.parametrize("seed", range(5))
def test_maps_equal_to_the_image_stay_equal_to_it(kind, seed):
    picture = colours(30, 14)
    values = np.asarray(picture).transpose(2, 0, 1)
    for height, width in ((30, 14), (60, 28)):  # a scale at which the nearest pixel is any filter's flat middle
        flat = build_transform(height, width, train=True, pad=6, **RAW)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        entry = values if kind != "map" else np.asarray(enlarged).transpose(2, 0, 1)
        image, extras = transformed(flat, enlarged, seed, map=Extra(kind, [entry]))
        assert extras["map"].dtype == torch.uint8
        assert torch.equal(extras["map"].float(), (image * 255).round())


def test_float_maps_are_resized_as_the_image():
    ramp = np.linspace(0, 255, 40 * 20).reshape(40, 20).round()
    picture = Image.fromarray(np.stack([ramp] * 3, axis=-1).astype(np.uint8))
    transform = build_transform(23, 31, train=True, pad=4, **RAW)
    for seed in range(5):
        image, extras = transformed(transform, picture, seed, map=Extra("map", [ramp / 255]))
        assert extras["map"].dtype == torch.float32
        torch.testing.assert_close(extras["map"][0], image[0], atol=0.02, rtol=0)


def test_smaller_maps_are_picked_or_averaged():
    values = np.random.default_rng(0).integers(0, 256, (50, 20), dtype=np.uint8)
    checks = np.indices((50, 20)).sum(axis=0) % 2.0
    extras = {"mask": Extra("mask", [values]), "labels": Extra("labels", [values]), "map": Extra("map", [checks])}
    _, found = transformed(build_transform(10, 4, train=False), colours(50, 20), **extras)
    # Of five pixels the middle one; the mean of all is a half.
    assert np.array_equal(found["mask"][0], values[2::5, 2::5])
    assert np.array_equal(found["labels"][0], values[2::5, 2::5])
    assert (found["map"] - 0.5).abs().max() < 0.1


def test_views_become_what_the_same_photograph_becomes():
    transform = build_transform(30, 14, train=True, pad=6)
    same = np.asarray(colours(30, 14)).transpose(2, 0, 1)
    for seed in range(5):
        image, extras = transformed(transform, colours(30, 14), seed, view=Extra("view", [np.stack([same, same])]))
        assert torch.equal(extras["view"], torch.stack([image, image]))
    # Of another size they are resized by the same filter, on tensors.
    other = Extra("view", [np.full((3, 7, 9), 200, np.uint8)])
    _, extras = transformed(build_transform(30, 14, train=False, **RAW), colours(30, 14), other=other)
    torch.testing.assert_close(extras["other"], torch.full((3, 30, 14), 200 / 255))


def test_a_flip_exchanges_left_and_right():
    picture, rng = colours(8, 6), np.random.default_rng(1)
    once = build_transform(8, 6, train=True, flip=1, pad=0, erasing=0)
    joints = np.concatenate([rng.integers(0, 6, (14, 2)), rng.random((14, 1))], axis=1).astype(np.float32)
    channels, classes = rng.random((4, 8, 6), np.float32), rng.integers(0, 5, (3, 8, 6), dtype=np.uint8)
    extras = {
        "joints": Extra("keypoints", [joints], BODY_PAIRS),
        "channels": Extra("mask", [channels], ((1, 3),)),
        "classes": Extra("labels", [classes], ((3, 4),)),
    }
    _, found = transformed(once, picture, **extras)
    order = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10]
    np.testing.assert_allclose(found["joints"], (joints * [-1, 1, 1] + [5, 0, 0])[order])
    assert np.array_equal(found["channels"], channels[[0, 3, 2, 1], :, ::-1])
    exchanged = np.array([0, 1, 2, 4, 3], np.uint8)
    assert np.array_equal(found["classes"][0], exchanged[classes[0, :, ::-1]])
    assert np.array_equal(found["classes"][1:], classes[1:, :, ::-1])  # only the first channel holds classes
    _, still = transformed(build_transform(8, 6, train=False), picture, **extras)
    np.testing.assert_allclose(still["joints"], joints, atol=1e-6)


def test_keypoints_outside_the_image_have_no_confidence():
    points = np.array([[-0.6, 3, 1], [-0.4, 3, 1], [9.4, 3, 1], [9.6, 3, 1], [3, 20, 1], [3, 3, 0]], np.float32)
    # Padding does not bring them back, though they lie within the padded image.
    transform = build_transform(20, 10, train=True, flip=0, pad=9, erasing=0)
    for seed in range(5):
        _, extras = transformed(transform, colours(20, 10), seed, points=Extra("keypoints", [points]))
        assert extras["points"][[0, 3, 4, 5], 2].tolist() == [0, 0, 0, 0]
    _, extras = transformed(build_transform(20, 10, train=False), colours(20, 10), points=Extra("keypoints", [points]))
    assert extras["points"][:, 2].tolist() == [0, 1, 1, 0, 0, 0]


@pytest.fixture
def train():
    images = synthetic_data(SyntheticSettings(6, 1, 6, 0, 3, 48, 24)).train
    rng = np.random.default_rng(0)
    joints = np.concatenate([rng.uniform(0, 24, (36, 14, 2)), np.ones((36, 14, 1))], axis=2)
    extras = {"joints": Extra("keypoints", joints, BODY_PAIRS), "index": Extra("mask", np.arange(36).reshape(36, 1, 1))}
    return replace(images, extras=extras)


def test_batches_carry_extras_whatever_loads_them(train):
    dataset = ReidDataset(train, build_transform(48, 24, train=True, pad=0, erasing=0))
    plain = ReidDataset(replace(train, extras={}), dataset.transform)
    sampler = PKSampler(train, identities_per_batch=3, instances=2)
    alone, workers, without = (
        list(DataLoader(source, batch_sampler=sampler, num_workers=count, collate_fn=collate))
        for source, count in ((dataset, 0), (dataset, 2), (plain, 0))
    )
    for batch, other, image_only in zip(alone, workers, without, strict=True):
        assert torch.equal(batch.image, image_only.image)
        assert image_only.extras == {}
        assert batch.extras["joints"].shape == (6, 14, 3)
        assert torch.equal(batch.extras["joints"], other.extras["joints"])
        assert torch.equal(batch.extras["index"][:, 0, 0, 0].long(), batch.index)
    assert alone[0].to("meta").extras["joints"].device.type == "meta"


def test_extras_are_selected_with_their_images(train):
    chosen = train.select([30, 2])
    batch = collate([ReidDataset(chosen, build_transform(48, 24, train=False))[i] for i in range(2)])
    assert batch.extras["index"][:, 0, 0, 0].tolist() == [30, 2]
    with pytest.raises(ValueError, match="mask: 2 entries were given; 36 are needed"):
        replace(train, extras={"mask": Extra("mask", [1, 2])})


def test_extras_are_read_from_files(tmp_path):
    values = np.random.default_rng(0).integers(0, 20, (9, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "b.npz", anything=values)
    palette = Image.fromarray(values).convert("P")
    palette.putpalette(range(60))
    Image.fromarray(values).save(tmp_path / "c.png")
    palette.putdata(values.ravel().tolist())
    palette.save(tmp_path / "d.png")
    iuv = np.stack([values, values + 1, values + 2], axis=-1)
    Image.fromarray(iuv).save(tmp_path / "e.png")
    extra = Extra("labels", [str(tmp_path / name) for name in ("a.npy", "b.npz", "c.png", "d.png", "e.png")])
    for index in range(4):
        assert np.array_equal(extra.load(index, 9, 5), values[None])
    assert np.array_equal(extra.load(4, 9, 5), iuv.transpose(2, 0, 1))


def test_files_that_mirror_the_images_become_an_extra(tmp_path):
    data = synthetic_data(SyntheticSettings(2, 1, 2, 1, 2, 32, 16))
    lists = [data.train, data.query, data.gallery]
    for number, path in enumerate(itertools.chain(*(images.paths for images in lists))):
        file = tmp_path / "masks" / f"{path}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full((3, 2), number, np.uint8))
    with_masks = with_extra(data, "mask", tmp_path / "masks", "mask", root="")
    found = [images.extras["mask"].load(i, 32, 16)[0, 0, 0] for images in with_masks.splits.values()
             for i in range(len(images))]  # fmt: skip
    assert found == list(range(sum(map(len, lists))))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mask: 1 of \d+ images have no file in .*masks"):
        with_extra(data, "mask", tmp_path / "masks", "mask", root="")


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("keypoints", np.ones((14, 2)), r"keypoints of image 0: float64 \[14, 2\] was given; \[P, 3\]"),
        ("keypoints", np.ones(3), "keypoints of image 0"),
        ("mask", np.ones(3), r"mask of image 0: float64 \[3\] was given; \[H, W\] or"),
        ("mask", np.ones((0, 3)), "mask of image 0"),
        ("map", np.array([[np.nan, 0]]), "map of image 0: infinite or undefined"),
        ("labels", np.array([["a"]]), "labels of image 0"),
        ("labels", np.array([[256]]), "labels of image 0: values from 256 to 256"),
        ("labels", np.array([[0.5]]), "labels of image 0: float64"),
        ("view", np.ones((4, 5, 5), np.uint8), "view of image 0"),
        ("view", np.ones((3, 5, 5)), "view of image 0: float64"),
    ],
)
def test_what_an_extra_cannot_be_is_named(kind, entry, message):
    with pytest.raises(ValueError, match=message):
        Extra(kind, [entry]).load(0, 8, 4)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("keypoints", np.ones((13, 3))),
        ("mask", np.ones((8, 4))),
        ("labels", np.ones((8, 4), int)),
        ("view", np.ones((3, 8, 4), np.uint8)),
    ],
)
def test_pairs_beyond_what_an_entry_has_are_named(kind, entry):
    with pytest.raises(ValueError, match=f"{kind} of image 0: pairs .* were given"):
        Extra(kind, [entry], (*BODY_PAIRS, (255, 256))).load(0, 8, 4)


def test_extras_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="kind: 'pose' was given; allowed are keypoints, mask"):
        Extra("pose", [])
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.npy").write_bytes(b"no array")
    np.savez(tmp_path / "c.npz", one=np.ones(2), two=np.ones(2))
    (tmp_path / "d.pkl").write_bytes(b"")
    for name in ("a.png", "b.npy", "c.npz", "d.pkl", "none.npy"):
        with pytest.raises(OSError, match=f"cannot read .*{name}"):
            Extra("mask", [tmp_path / name]).load(0, 8, 4)
    images = ImageList(
        identity=[0, 1], camera=[0, 0], viewpoint=[0, 0], paths=("a", "b"), viewpoint_name=("", ""),
        loader=lambda _: colours(8, 4), extras={"mask": Extra("mask", [np.ones((8, 4)), np.ones((2, 8, 4))])},
    )  # fmt: skip
    dataset = ReidDataset(images, build_transform(8, 4, train=False))
    with pytest.raises(ValueError, match=r"extras: mask of shapes \(1, 8, 4\) and \(2, 8, 4\)"):
        collate([dataset[0], dataset[1]])


def batch_with_extras():
    """Random extras of every kind that methods read, beside random images; U and V are 0 where there is no part."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 6, generator=rng)
    index = torch.arange(3)
    iuv = torch.randint(0, 25, (3, 3, 8, 6), generator=rng, dtype=torch.uint8)
    iuv[:, 1:] *= iuv[:, :1] > 0
    extras = {
        "keypoints": torch.rand(3, 14, 3, generator=rng) * 5,
        "parsing": torch.rand(3, 5, 8, 6, generator=rng),
        "iuv": iuv,
        "views": torch.rand(3, 8, 3, 8, 6, generator=rng),
    }
    return Batch(images, index, index, index, index, extras)


def test_mirrored_twice_is_the_same_batch():
    batch = batch_with_extras()
    once = batch.mirrored()
    again = once.mirrored()
    assert torch.equal(again.image, batch.image)
    for name, value in batch.extras.items():
        torch.testing.assert_close(again.extras[name], value, atol=1e-6, rtol=0)
        assert not torch.equal(once.extras[name], value)


def test_a_mirrored_batch_is_what_loading_mirrored_images_gives():
    """Whatever the photograph is, its extras, loaded with a flip, are the batch's mirrored."""
    data = synthetic_data(SyntheticSettings(2, 1, 3, 0, 2, 48, 24), extras=tuple(EXTRAS))
    plain, flipped = (
        collate(
            [ReidDataset(data.train, build_transform(32, 16, train, flip=1, pad=0, erasing=0))[i] for i in range(6)]
        )
        for train in (False, True)
    )
    found = plain.mirrored()
    torch.testing.assert_close(found.image, flipped.image, atol=2e-2, rtol=0)
    for name, value in flipped.extras.items():
        tolerance = 2e-2 if name == "views" else 1e-5
        torch.testing.assert_close(found.extras[name].float(), value.float(), atol=tolerance, rtol=0)


def test_flipped_features_see_mirrored_extras():
    class Reads(Method):
        def features(self, batch):
            return [batch.extras["keypoints"].flatten(1), batch.extras["parsing"].mean(2).flatten(1)]

    batch = batch_with_extras()
    found = Reads().embed(batch, flip=True, normalize="none")
    x = batch.extras["keypoints"].clone()
    x[:, :, 0] = 5 - x[:, :, 0]
    x = x[:, [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10]]
    torch.testing.assert_close(found[:, :42], (batch.extras["keypoints"] + x).flatten(1))
    columns = batch.extras["parsing"].mean(2)
    torch.testing.assert_close(found[:, 42:], (columns + columns.flip(2)).flatten(1))
